#!/usr/bin/env bash
# From a file of chats to a model that answers in transformers, on a CPU, without network.
#
#   bash examples/own_chats.sh [FOLDER]
#
# The model is the quickstart's, which comes with the package. For another, take its config in place of quickstart, and
# the section dataset as docs/data.md has it.
set -euo pipefail
folder=${1:-/tmp/gmt-tune/own_chats}
mkdir -p "$folder"

# 1. The chats: a line each, in ShareGPT's form. docs/data.md has the other forms.
cat > "$folder/chats.jsonl" <<'CHATS'
{"conversations": [{"from": "human", "value": "Where does Ada live?"}, {"from": "gpt", "value": "In the red house."}]}
{"conversations": [{"from": "human", "value": "Where does Bob live?"}, {"from": "gpt", "value": "In the old mill."}]}
{"conversations": [{"from": "human", "value": "Who bakes bread?"}, {"from": "gpt", "value": "Cora does."}, {"from": "human", "value": "And who sells it?"}, {"from": "gpt", "value": "Her brother Dan."}]}
CHATS

# 2. Training: 120 times through them, a step each. Wrong rows end it here, with their line.
tune run gmt_full_finetune --config quickstart \
    output_dir="$folder/run" \
    dataset._component_=torchtune.datasets.chat_dataset ~dataset.size ~evaluation \
    dataset.source=json dataset.data_files="$folder/chats.jsonl" dataset.split=train \
    dataset.conversation_column=conversations dataset.conversation_style=sharegpt \
    batch_size=3 gradient_accumulation_steps=1 epochs=120 max_steps_per_epoch=null

# 3. The model answers, with its own chat template.
python - "$folder/run/epoch_119" <<'PYTHON'
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
for question in ("Where does Ada live?", "Where does Bob live?"):
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=40, do_sample=False, eos_token_id=stop)
    print(question, "->", tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
PYTHON
