#!/bin/bash
# Tries llama3_1/8B_gmt_compact with chats of your own on a CPU, before a card is rented: about a minute, no weights.
#
#   CHATS=my_chats.jsonl bash examples/dry_run_8b.sh
#
# A line of my_chats.jsonl is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}.
# MODEL is the folder of Llama 3.1 8B Instruct; what it lacks of tokenizer and config.json is downloaded, which needs
# HF_TOKEN. Whatever stands behind the script's name changes the config: optimizer.lr=1e-5, say.
set -eu
model=${MODEL:-/tmp/Meta-Llama-3.1-8B-Instruct}

if [ ! -e "$model/config.json" ] || [ ! -e "$model/original/tokenizer.model" ]; then
    tune download meta-llama/Meta-Llama-3.1-8B-Instruct --output-dir "$model" --ignore-patterns "*.[bps]*" \
        --hf-token "$HF_TOKEN"
fi

# The same arguments behind `tune run gmt_full_finetune` train the model
gmt-tune try --config llama3_1/8B_gmt_compact \
    checkpointer.checkpoint_dir="$model" tokenizer.path="$model/original/tokenizer.model" \
    dataset=torchtune.datasets.chat_dataset dataset.source=json dataset.data_files="$CHATS" dataset.split=train \
    dataset.conversation_column=messages dataset.conversation_style=openai "$@"
