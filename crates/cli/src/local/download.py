"""Downloads what a model needs from Hugging Face's hub, into the cache that its tools keep: python download.py OWNER/NAME REVISION.

Prints an object with the folder, or with what went wrong. What was begun is gone on with.
"""
import json
import re
import sys


def wanted(files):
    """Configurations, vocabularies, and of each part's weights one variant: whole ones if there are any, else fp16, else bf16."""
    pipeline = "model_index.json" in files
    weights = re.compile(r"(?:(.*)/)?(?:diffusion_pytorch_)?model(?:-\d+-of-\d+)?(?:\.(fp16|bf16))?(?:-\d+-of-\d+)?\.safetensors(?:\.index(?:\.(fp16|bf16))?\.json)?")
    parts, chosen = {}, []
    for file in files:
        found = weights.fullmatch(file)
        folder = file.rpartition("/")[0]
        if found:
            # Beside a pipeline's index lie whole checkpoints of other programs. What is never read need not be there.
            if not (pipeline and not folder) and folder != "safety_checker":
                parts.setdefault(folder, {}).setdefault(found[2] or found[3] or "", []).append(file)
        elif re.search(r"\.(json|txt|model|jinja)$", file) and not re.search(r"\.safetensors\.index\.", file) and folder.count("/") == 0:
            chosen.append(file)
    for variants in parts.values():
        chosen += next(variants[name] for name in ("", "fp16", "bf16") if name in variants)
    return chosen


def main(repository, revision):
    from huggingface_hub import HfApi, snapshot_download

    files = HfApi().list_repo_files(repository, revision=revision)
    return snapshot_download(repository, revision=revision, allow_patterns=[re.sub(r"([*?\[])", r"[\1]", file) for file in wanted(files)])


try:
    print(json.dumps({"folder": main(*sys.argv[1:3])}))
except Exception as error:  # Whatever it is, a person is to read it.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    print(json.dumps({"error": f"{type(error).__name__}: {' '.join(lines)[:400]}"}))
    sys.exit(1)
