"""What the scripts beside it share: tiny tokenizers, random weights, and recording what a pipeline does. Needs torch 2.15.0, transformers 5.23.0, diffusers 0.42.1."""
import shutil
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPTokenizer, GemmaTokenizer, Qwen2Tokenizer, T5Tokenizer

HERE = Path(__file__).parent
# Prompts of the golden tensors: short; with digits, accents, punctuation and another script; long.
PROMPTS = ("a red apple", "Two cats, 3 dögs & an owl's nest — 苹果!  (8k)", "the quick brown fox jumps over the lazy dog while it's raining and we've 42 reasons to stay at home tonight")
NEGATIVE = "blurry, low quality"
# Longer than CLIP reads, which is cut there; T5 reads all of it.
LONG = " ".join(["a red apple and two cats jumps over the lazy dog"] * 4)
WORDS = "a the red blue apple cat cats dog dogs owl nest quick brown fox jumps over lazy raining reasons stay home tonight picture of in on and with two three while it's we've".split()


def bytes_as_letters():
    """Byte-level BPE's letters for the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in plain)}
    return [others.get(b, chr(b)) for b in plain + sorted(others)]


def clip_tokenizer(merges=60, **special):
    """CLIP's tokenizer with few merges, learnt from WORDS."""
    letters = bytes_as_letters()
    words = Counter(tuple(w[:-1]) + (w[-1] + "</w>",) for w in WORDS)
    pairs = []
    while len(pairs) < merges:
        counts = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                counts[pair] += count
        if not counts:
            break
        best = max(sorted(counts), key=lambda pair: counts[pair])
        pairs.append(best)
        joined = Counter()
        for word, count in words.items():
            out, i = [], 0
            while i < len(word):
                both = word[i : i + 2] == best
                out.append("".join(word[i : i + 2]) if both else word[i])
                i += 2 if both else 1
            joined[tuple(out)] += count
        words = joined
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in pairs] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=pairs, model_max_length=77, **special), len(tokens)


def published_clip_files(folder, tokenizer):
    """The tokenizer as published checkpoints have it: vocab.json and merges.txt, without tokenizer.json."""
    import json

    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(state["vocab"], ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in state["merges"]) + "\n")
    (folder / "tokenizer.json").unlink()


def t5_tokenizer():
    """T5's tokenizer with the words of WORDS, and letters for the rest."""
    letters = sorted({letter for prompt in PROMPTS for letter in prompt.lower() if letter not in " —苹果"})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [("▁" + word, -3.0 - i * .01) for i, word in enumerate(sorted(set(WORDS)))] + [(letter, -6.0 - i * .01) for i, letter in enumerate(letters)]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=2, model_max_length=512)
    return tokenizer, len(tokenizer)


CHAT = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def qwen_tokenizer():
    """Qwen's tokenizer with few merges, and its way of writing a chat down."""
    letters = bytes_as_letters()
    merges = [("c", "a"), ("ca", "t"), ("Ġ", "a"), ("t", "h"), ("th", "e"), ("o", "n"), ("i", "n")]
    vocabulary = {token: i for i, token in enumerate(letters + ["".join(pair) for pair in merges])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, model_max_length=131072)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT
    return tokenizer, len(tokenizer)


def gemma_tokenizer(text, merges=200):
    """Gemma's tokenizer with merges learnt from a text, across words as it has them; other characters fall back to their bytes."""
    sequence = list(text.replace(" ", "▁"))
    letters, pairs = sorted(set(sequence) | set("▁abcdefghijklmnopqrstuvwxyz")), []
    for _ in range(merges):
        counts = Counter(zip(sequence, sequence[1:]))
        best = max(sorted(counts), key=lambda pair: counts[pair])
        pairs.append(best)
        joined, i = [], 0
        while i < len(sequence):
            both = tuple(sequence[i : i + 2]) == best
            joined.append("".join(best) if both else sequence[i])
            i += 2 if both else 1
        sequence = joined
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"] + [f"<0x{b:02X}>" for b in range(256)] + letters + ["".join(pair) for pair in pairs]
    tokens = list(dict.fromkeys(tokens))
    tokenizer = GemmaTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=pairs, add_bos_token=True, model_max_length=8192)
    return tokenizer, len(tokenizer)


@torch.no_grad()
def randomise(*models):
    """Norms off 1, biases that show, weights that keep the size of what goes through."""
    for model in models:
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * .1 + 1 if p.dim() == 1 and p.mean() > .5 else torch.randn_like(p) / max(p[0].numel(), 4) ** .5)
        model.eval()


def save(pipe, name, golden, **how):
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    pipe.save_pretrained(folder, **how)
    write_golden(folder, golden)
    return folder


def write_golden(folder, golden):
    save_file({k: v.contiguous() for k, v in golden.items()}, folder / "golden.safetensors")
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    print(folder.name, sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) // 1000, "kB", {k: tuple(v.shape) for k, v in golden.items() if "image" in k})


@torch.no_grad()
def record(pipe, golden, key, prompt, seed, unpack=lambda latents: latents, guided_steps=None, **options):
    """Latents after every evaluation, `unpack`ed, and the picture (uint8), into golden[key + ...]. From step `guided_steps` on there is no guidance (diffusers' guide to callbacks tells how)."""
    latents = []
    texts = ["prompt_embeds", "add_text_embeds", "add_time_ids"]
    if guided_steps is not None:
        options["callback_on_step_end_tensor_inputs"] = ["latents", *(text for text in texts if text in pipe._callback_tensor_inputs)]

    def note(pipe, step, __, tensors):
        latents.append(unpack(tensors["latents"]).clone())
        if guided_steps is not None and step + 1 == guided_steps:
            pipe._guidance_scale = 0.0
            tensors.update({text: tensors[text].chunk(2)[-1] for text in texts if text in tensors})
        return tensors

    out = pipe(prompt, generator=torch.Generator().manual_seed(seed), callback_on_step_end=note, output_type="np", **options)
    golden[f"{key}.latents"] = torch.cat(latents)
    golden[f"{key}.image"] = torch.from_numpy((out.images[0] * 255).round()).to(torch.float32)


@torch.no_grad()
def record_batch(pipe, golden, key, seed, **options):
    """One run with all prompts; each sample has a generator of its own, so that it equals a run alone."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(PROMPTS))]
    out = pipe(list(PROMPTS), generator=generators, output_type="np", **options)
    for i, image in enumerate(out.images):
        golden[f"{key}.{i}.image"] = torch.from_numpy((image * 255).round()).to(torch.float32)
