"""Two tasks with the Hugging Face Trainer: each `train` learns one mask over a frozen pretrained model."""

import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

import exssnet
from exssnet.compat.huggingface import PhaseTrainer

config = BertConfig(
    vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
)  # in your program: AutoModelForSequenceClassification.from_pretrained("bert-base-uncased")
model = BertForSequenceClassification(config)
phases = exssnet.mask_tuning(model, density=0.8, head="classifier")

words = torch.randint(100, (64, 8))
for task in range(2):
    data = [{"input_ids": text, "labels": int(text[task] < 50)} for text in words]
    arguments = TrainingArguments(f"runs/task-{task}", num_train_epochs=2, learning_rate=5e-4, report_to="none")
    PhaseTrainer(phases, arguments, train_dataset=data).train()

phases.activate(0)  # the model is the network of task 0 again
