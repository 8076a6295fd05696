"""The order of the modules: imports go up this list, never down, and no module is missing from it."""

import ast
import re
from pathlib import Path

ORDER = [
    "files", "sections", "checks", "model_checks", "run_checks", "config", "cost", "sharding", "processes", "cli",
    "grid", "study", "sentencepiece_model", "tokenizer", "sources", "shards", "streaming", "hop_task", "grouping",
    "row_function", "block_loop", "grouped_kernels", "grouped", "exchange", "visibility", "attention_kernels",
    "attention", "cache", "layers", "controllers", "router", "exit_router", "peer_routers", "metrics", "orders",
    "pool", "depth", "model", "losses", "low_rank", "optimizer", "train_step", "run_folder", "environment",
    "checkpoint", "data", "trained", "plots", "comparisons", "sampling", "decode_requests", "decode_cache",
    "decode_attention", "decode_step", "decode_loop", "decode", "trackers", "writers", "progress", "profiling",
    "preemption", "alarms", "watchdog", "prepare", "evaluate", "hops", "copying", "generate", "harness", "lm_eval",
    "routes", "page", "run_figures", "report", "program", "aot", "baseline", "timing", "decode_benchmark",
    "cache_benchmark", "router_benchmark", "kernel_benchmark", "benchmark", "train_log", "non_finite", "train_loop",
    "trainer", "pretrained", "llama", "opt", "gguf_file", "interchange", "export", "import", "torch_models",
    "radialize", "executions", "residuals", "torch_residuals", "profile", "skips", "sparse", "sparse_training",
    "sparse_decode", "sparse_costs", "sparsity", "jobs", "sweep", "results", "scaling",
]  # fmt: skip
ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "radialnet"


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "radialnet":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("radialnet.")}
    return found


def test_imports_go_one_way():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert modules == set(ORDER)
    num_imports = 0
    for name in ORDER:
        for imported in imports_of(PACKAGE / f"{name}.py"):
            assert ORDER.index(imported) < ORDER.index(name), f"{name} imports {imported}"
            num_imports += 1
    assert num_imports > 40


def test_the_readme_tells_of_each_module_in_their_order():
    """Rows of its table, the modules of a row in any order."""
    table = (ROOT / "README.md").read_text().split("## Modules")[1]
    rows = [re.findall(r"`(\w+)`", row) for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)]
    row_of = {name: number for number, row in enumerate(rows) for name in row}
    assert sorted(row_of) == sorted(ORDER) and len(rows) > 30
    for name in ORDER:
        assert all(row_of[imported] <= row_of[name] for imported in imports_of(PACKAGE / f"{name}.py")), name


def test_the_faults_of_the_table_are_those_of_tests():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "RELIABILITY.md").read_text()))
    there = {
        name for path in (ROOT / "tests").glob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert len(named) > 30 and named <= there


def test_config_needs_no_jax():
    for name in ("files", "sections", "checks", "model_checks", "run_checks", "config"):
        assert not re.search(r"^\s*(import|from) jax", (PACKAGE / f"{name}.py").read_text(), re.MULTILINE), name
    for path in (ROOT / "configs").glob("*.py"):
        roots = {
            (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        assert roots <= {"ml_collections", "configs"}, path
