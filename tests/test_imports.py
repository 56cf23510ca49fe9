"""The direction in which rooms may import each other, and what importing may not do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "finestsam"
# Lowest first. A room may import rooms of lower levels and its own.
LEVELS = {
    "__init__": 0, "errors": 0, "config": 0, "batch": 0, "removed_settings": 0, "runtime": 1, "masks": 1, "records": 2,
    "images": 2, "presets": 2, "formats": 3, "model": 3, "data": 4, "prediction": 5, "evaluation": 6, "tasks": 7,
    "export": 7, "training": 8, "modes": 9, "cli": 10, "__main__": 11,
}  # fmt: skip
# Where each library may be touched.
LIBRARIES = {
    "cv2": {"files", "frames", "masks", "overlay", "processes"},
    "segment_anything": {
        "architectures",
        "sam",
        "load",
        "trainable",
        "generator",
        "decoder",
        "encoder",
        "adapter",
        "lora",
        "fft_attention",
        "heads",
        "tiny_vit",
        "onnx",
        "hugging_face",
    },  # fmt: skip
    "timm": {"tiny_vit"},
    "onnxruntime": {"onnx_check"},
    "pycocotools": {"masks", "coco_scores"},
    "matplotlib": {"plots", "charts"},
}


def list_imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def find_room(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    room = find_room(path)
    for name in list_imports(path):
        if name.startswith("finestsam."):
            other = name.split(".")[1]
            if other == "__version__":
                continue
            assert LEVELS[other] < LEVELS[room] or other == room, f"{room} imports {name}"
        assert name.split(".")[0] not in {"recipes", "benchmarks"}, f"{room} imports {name}, which no wheel has"
        for library, modules in LIBRARIES.items():
            if name.split(".")[0] == library:
                assert path.stem in modules, f"{path.stem} imports {library}"


def test_parsing_a_command_line_imports_neither_torch_nor_lightning():
    code = "import sys, finestsam.cli; sys.exit(any(name in sys.modules for name in ('torch', 'lightning', 'cv2')))"

    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, timeout=300).returncode == 0
