"""Puts measured numbers into README.md and docs/: every block between <!-- name --> and <!-- /name --> is made here.

From the files in benchmarks/results/ and, for what is derived on paper, paper.py. What has no file yet is marked as not
measured, with the command for it.

python benchmarks/report.py           # rewrites the blocks
python benchmarks/report.py --check   # fails if they are not what the results say
"""

import re
import sys

from tables import denoisers, exact, gaussian, gpu, mapped, moments, pruned, results, scale, theory
from tables.results import NOT_MEASURED, Missing, result, table

PAGES = (results.ROOT / "README.md", *sorted((results.ROOT / "docs").rglob("*.md")))

COMMANDS = {
    "exact_cpu": "exact_cpu.py --images cifar10",
    "accuracy": "accuracy.py",
    "pruned_cpu": "pruned_cpu.py --images cifar10 --indexes indexes",
    "pruned_attack": "pruned_attack.py --images cifar10",
    "pruned_policy": "pruned_policy.py --images cifar10",
    "mapped": "mapped.py cifar10 --gib 12 --limit-gib 4 --max-windows 16000000",
    "scale": "scale.py --images cifar10",
    "many_samples": "many_samples.py train-images-idx3-ubyte.gz",
    "scaling": "scaling.py --images cifar10",
    "end_to_end": "end_to_end.py --cifar10 cifar10 --fashion-mnist train-images-idx3-ubyte.gz --indexes indexes",
    "gpu-*": "gpu.py --images cifar10 --indexes indexes",
    "theory": "theory.py fashion-mnist examples/fashion-mnist-resnet-zeros.safetensors fashion-mnist",
    "scales": "scales.py cifar10 cifar10 --limit 1000",
    "theories": "theories.py fashion-mnist",
    "league": "league.py fashion-mnist-resnet examples/fashion-mnist-resnet-zeros.safetensors fashion-mnist",
    "circular": "circular.py fashion-mnist NETWORK fashion-mnist",
    "adapters": "adapters.py",
    "moments": "moments.py cifar10",
    "gaussian-fashion-mnist": "gaussian.py fashion-mnist",
    "gaussian-cifar10": "gaussian.py cifar10 cifar10/train",
    "guidance": "guidance.py",
    "nearest_cut": "nearest_cut.py",
    "latents": "latents.py --images cifar10",
    "classification": "classification.py t10k-images-idx3-ubyte.gz t10k-labels-idx1-ubyte.gz",
    "fused_precision": "fused_precision.py cifar10",
    "fused_compile": "compile_report.py",
    "fused_compile-before": "compile_report.py --suffix=-before",
    "fused_compile-triton-3.6": "compile_report.py --suffix=-triton-3.6",
    "sliding_cuda_sass": "sass.py",
}
"""What writes each result file: every file that there is, or should be."""


def optional(block) -> str:
    """The block, or that there is nothing to make it from."""
    try:
        return block()
    except Missing as missing:
        command = f"python benchmarks/{COMMANDS[str(missing)]}"
        return f"*Not measured*: there is no `benchmarks/results/{missing}.json`; `{command}` makes it."


def files() -> str:
    """Every result file: what it is, and of what machine, commit and date."""
    names = sorted(
        {*(path.stem for path in results.RESULTS.glob("*.json")), *(name for name in COMMANDS if "*" not in name)}
    )
    if not any(name.startswith("gpu-") for name in names):
        names.append("gpu-*")
    rows = []
    for name in names:
        script = COMMANDS.get(name) or COMMANDS["gpu-*"]
        path = results.RESULTS / f"{name}.json"
        if path.exists():
            record = result(name)
            where = [record["machine"], f"torch {record['versions']['torch']}", record["commit"], record["date"]]
            rows.append([f"`{name}`", record["what"].rstrip("."), *where, f"`{script}`"])
        else:
            rows.append([f"`{name}`", NOT_MEASURED, "", "", "", "", f"`{script}`"])
    return table(["file", "what", "machine", "versions", "commit", "date", "`python benchmarks/...`"], rows)


BLOCKS = (
    exact.headline,
    files,
    exact.accuracy,
    pruned.coverage,
    exact.exact,
    exact.end_to_end,
    exact.scaling,
    mapped.mapped,
    scale.ranks,
    scale.step_cost,
    scale.many_samples,
    gpu.on_paper,
    gpu.sliding_compiled,
    gpu.expected_steps,
    gpu.anchors,
    gpu.gpu,
    denoisers.agreement,
    denoisers.flow,
    denoisers.guidance,
    denoisers.nearest_cut,
    gaussian.departure,
    gaussian.skipping,
    gaussian.starting,
    denoisers.classification,
    theory.theory,
    theory.limits,
    theory.training,
    theory.scales,
    theory.theories_cost,
    theory.league,
    theory.circular,
    theory.scales_of_networks,
    moments.bits,
    moments.samplers,
    moments.restoration,
    moments.moment_costs,
    pruned.pruned_steps,
    pruned.pruned_indexes,
    pruned.pruned_contenders,
    pruned.pruned_attack,
    pruned.pruned_policy,
    pruned.latents,
    gpu.fused_compiled,
    gpu.fused_everywhere,
    gpu.fused_before,
    gpu.fused_precision,
    gpu.fused_columns,
)


def filled(page: str) -> str:
    """The page with every block made afresh."""
    made = {block.__name__: block for block in BLOCKS}

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- {name} -->\n{optional(made[name])}\n<!-- /{name} -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", fill, page, flags=re.DOTALL)


def main() -> None:
    for path in PAGES:
        page = path.read_text()
        made = filled(page)
        if "--check" in sys.argv[1:] and page != made:
            sys.exit(f"{path.relative_to(results.ROOT)} is not what the results say: run python benchmarks/report.py")
        if page != made:
            path.write_text(made)


if __name__ == "__main__":
    main()
