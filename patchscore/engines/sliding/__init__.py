"""Engine `sliding`: exact sums from the raw images by running sums along displacement diagonals; C++ and CUDA C++."""
