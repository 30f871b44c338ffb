"""The safetensors files of a checkpoint folder, as one set of tensors."""

from __future__ import annotations

import json
from pathlib import Path

from lockstep.weights.errors import WeightError
from lockstep.weights.reader import Entry, SafetensorsFile

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def find_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files that hold the weights, and the index (tensor -> file name) when there is one.

    An index wins over loose files. Raises WeightError when there are no safetensors, or an indexed file is missing.
    """
    if not folder.is_dir():
        raise WeightError(f"{folder} is not a folder: name a folder with a Hugging Face checkpoint.")
    if (folder / INDEX).is_file():
        return _from_index(folder)
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], None
    # Mistral's folders carry the same weights a second time under their own names.
    loose = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated"))
    if loose:
        return loose, None
    others = sorted(path.name for pattern in ("*.bin", "*.pth", "*.pt", "*.gguf") for path in folder.glob(pattern))
    if others:
        raise WeightError(
            f"{folder} has {others[0]} but no safetensors: convert it, for instance with"
            " transformers' model.save_pretrained(folder, safe_serialization=True)."
        )
    raise WeightError(f"{folder} has no {SINGLE}, {INDEX} or other safetensors file: download the checkpoint again.")


def _from_index(folder: Path) -> tuple[list[Path], dict[str, str]]:
    path = folder / INDEX
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        index = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise WeightError(f"{path} is not a safetensors index ({type(e).__name__}: {e}): download it again.") from None
    names = sorted(set(index.values()))
    for name in names:
        if Path(name).name != name:
            raise WeightError(f"{path} names the file {name!r}, which is not inside the folder: download it again.")
        if not (folder / name).is_file():
            raise WeightError(f"{folder / name} is missing, but {INDEX} lists it: download that file.")
    return [folder / name for name in names], index


class Checkpoint:
    """All tensors of a folder: `tensors[name]` is (file, entry). A context manager that closes its files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: list[SafetensorsFile] = []
        self.tensors: dict[str, tuple[SafetensorsFile, Entry]] = {}
        paths, index = find_files(folder)
        try:
            for path in paths:
                self._add(SafetensorsFile(path), index)
            for name, file in (index or {}).items():
                if name not in self.tensors:
                    raise WeightError(f"{folder / file} has no tensor {name!r}, but {INDEX} says so: download that file again.")
        except BaseException:
            self.close()
            raise

    def _add(self, file: SafetensorsFile, index: dict[str, str] | None) -> None:
        self.files.append(file)
        for name, entry in file.entries.items():
            if index is not None and index.get(name) != file.path.name:
                continue
            if name in self.tensors:
                raise WeightError(f"tensor {name!r} is in {self.tensors[name][0].path.name} and {file.path.name}: remove one file.")
            self.tensors[name] = (file, entry)

    @property
    def bytes_read(self) -> int:
        """Tensor bytes read so far, headers not counted."""
        return sum(file.bytes_read for file in self.files)

    @property
    def header_bytes(self) -> int:
        return sum(file.header_bytes for file in self.files)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors in the folder."""
        return sum(entry.nbytes for _, entry in self.tensors.values())

    def close(self) -> None:
        for file in self.files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
