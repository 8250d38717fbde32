"""Clock and power of a GPU while something runs, from nvidia-smi where there is one."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import threading
import time

FIELDS = {"clocks.sm": "clock_mhz", "power.draw": "power_watts", "temperature.gpu": "celsius"}
PERIOD = 0.1  # seconds


class Sensors:
    """Readings of the first GPU as they come; `between` has the medians of a span."""

    def __init__(self) -> None:
        self.readings: list[tuple[float, list[float]]] = []
        self.process: subprocess.Popen[str] | None = None
        if shutil.which("nvidia-smi"):
            query = ["--query-gpu=" + ",".join(FIELDS), "--format=csv,noheader,nounits"]
            command = ["nvidia-smi", "-i", "0", *query, f"--loop-ms={round(1000 * PERIOD)}"]
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                values = [float(value) for value in line.split(",")]
            except ValueError:  # "[N/A]"
                continue
            self.readings.append((time.perf_counter(), values))

    def between(self, start: float, end: float) -> dict[str, float]:
        """Medians of the readings of a span of time.perf_counter(); nothing where there were none."""
        found = [values for at, values in self.readings if start <= at <= end and len(values) == len(FIELDS)]
        columns = zip(*found, strict=True)
        return {name: statistics.median(column) for name, column in zip(FIELDS.values(), columns, strict=False)}

    def close(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
