"""Adapters to other libraries: each translates one library's convention into z and sigma."""
