"""`patchscore bench`: the benchmarks of the repository."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

from .options import one_line_errors


@click.command(
    epilog="""
\b
Examples:
  patchscore bench
  patchscore bench --full --images cifar10 --indexes indexes
  patchscore bench --gpu --images cifar10
"""
)
@click.option("--full", is_flag=True, help="Everything that the inputs below allow; hours.")
@click.option("--gpu", is_flag=True, help="The benchmark of the GPU.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write.  [default: out-bench]")
@click.option("--images", type=click.Path(path_type=Path), help="CIFAR-10: a folder or tar, a subfolder a class.")
@click.option("--fashion-mnist", type=click.Path(path_type=Path), help="Folder of Fashion-MNIST's four IDX files.")
@click.option("--indexes", type=click.Path(path_type=Path), help="Folder where indexes are kept or built, 40 GB.")
@one_line_errors
def bench(full: bool, gpu: bool, **paths: Path | None) -> None:
    """Measure the engines on this machine: rates beside peers, whole samples, scaling.

    By default it takes less than five minutes and prints tables; JSON and plots go to the output folder. With --full
    and no --out, it rewrites the results and pages of the project itself. The benchmarks come with the source
    (repository or sdist), not with the wheel.
    """
    script = Path(__file__).parent.parent.parent / "benchmarks" / "bench.py"
    if not script.exists():
        raise ValueError("bench: not in the wheel; get the source (repository or sdist) and run `make bench` there")
    options = [f"--{name.replace('_', '-')}={path.resolve()}" for name, path in paths.items() if path is not None]
    flags = ["--full"] * full + ["--gpu"] * gpu
    sys.exit(subprocess.call([sys.executable, str(script), *flags, *options]))
