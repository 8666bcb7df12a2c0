"""Makes the golden files beside it with transformers 5.23 from the model's GGUF file (transformers also needs `gguf` and `accelerate`).

python worker-brain/tests/smollm2/reference.py ~/.cache/efferent/brains/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf
"""
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
TEXTS = [
    "", " ", "a red apple", "a red apple to the left of a blue fish", "1234567890", "3 cats, 12 dogs & 2.5 pizzas", "line one\nline two\n\n\tindented",
    "<|im_start|>user\nDraw: a fox\nThe picture shows", "<|im_end|><|endoftext|>", "ein Äpfelchen für die Übergröße", "crème brûlée naïve façade", "🍎🐟 and 👩‍👩‍👧",
    "一个红苹果在蓝鱼的左边", "日本語とEnglish", "don't  can't   won't", "UPPER lower MiXeD_snake-case", "x" * 40, "\r\n\x00\x7f", "¿Qué? ¡Sí!", "مرحبا",
]
PROMPTS = ["a red apple to the left of a blue fish", "three cats", "a sliced Italian pie, 🍕!", "un chien bleu à la plage"]
LAYER, PREFIX, SUFFIX = 24, "<|im_start|>user\nDraw: ", "\nThe picture shows"


@torch.no_grad()
def main():
    path = Path(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    rows = [{"text": t, "ids": tokenizer(t, add_special_tokens=False)["input_ids"]} for t in TEXTS]
    (HERE / "tokens.json").write_text("[\n" + ",\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n]\n")
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    golden = {}
    for i, prompt in enumerate(PROMPTS):
        ids = tokenizer(PREFIX + prompt + SUFFIX, add_special_tokens=False, return_tensors="pt")["input_ids"]
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[LAYER][0]
        golden[f"{i}.ids"] = ids[0].float()
        # First, a middle and the last position: all 576 channels of each.
        golden[f"{i}.states"] = states[[0, len(states) // 2, -1]].clone()
    save_file(golden, HERE / "states.safetensors")


if __name__ == "__main__":
    main()
