"""Accuracy of one way to learn a text classification task from a pretrained encoder of `transformers`.

    python tune.py --model FOLDER --task FOLDER --way 0.8

--task has train.tsv and test.tsv with lines "label<TAB>text". --way is a density of mask tuning, "full" (fine-tuning of
all weights) or "linear" (a head on the frozen encoder). Prints one line of JSON.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import exssnet

RATES = {"full": 1e-4, "linear": 1e-2}  # of encoder and head; chosen on SST-2 with seed 0
MASK_RATE, HEAD_RATE, BATCH = 5e-4, 1e-3, 32


class Classifier(nn.Module):
    """The mean of the encoder's last hidden states, and a linear head."""

    def __init__(self, folder: str, classes: int) -> None:
        super().__init__()
        from transformers import AutoModel

        self.encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False)
        self.classifier = nn.Linear(self.encoder.config.hidden_size, classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        kept = mask[..., None].to(hidden)
        out: Tensor = self.classifier((hidden * kept).sum(1) / kept.sum(1))
        return out


def read(path: Path) -> list[tuple[str, str]]:
    rows = [line.rstrip("\n").split("\t") for line in path.open(encoding="utf-8")]
    return [(row[0], row[1]) for row in rows]


def batches(rows: list[tuple[int, str]], tokenizer: object, tokens: int, shuffle: bool) -> Iterator[tuple[Tensor, ...]]:
    """Batches of texts of about the same length: ids, attention mask, labels."""
    order = random.sample(rows, len(rows)) if shuffle else rows
    blocks = [sorted(order[i : i + 16 * BATCH], key=lambda row: len(row[1])) for i in range(0, len(order), 16 * BATCH)]
    taken = [block[i : i + BATCH] for block in blocks for i in range(0, len(block), BATCH)]
    for batch in random.sample(taken, len(taken)) if shuffle else taken:
        texts = [text for _, text in batch]
        found = tokenizer(texts, padding=True, truncation=True, max_length=tokens, return_tensors="pt")  # type: ignore
        yield found["input_ids"], found["attention_mask"], torch.tensor([label for label, _ in batch])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", type=Path, required=True)
    parser.add_argument("--way", default="0.95")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--texts", type=int, default=4000, help="training texts; at most 2000 test texts are used")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    from transformers import AutoTokenizer

    train, test = (read(options.task / f"{split}.tsv") for split in ("train", "test"))
    train = random.Random(0).sample(train, min(options.texts, len(train)))
    test = random.Random(1).sample(test, min(2000, len(test)))
    labels = sorted({label for label, _ in train + test})
    learned, tested = ([(labels.index(label), text) for label, text in rows] for rows in (train, test))
    torch.manual_seed(options.seed)
    random.seed(options.seed)
    model, tokenizer = Classifier(options.model, len(labels)), AutoTokenizer.from_pretrained(options.model)
    head, phases = model.classifier.parameters(), None
    if options.way == "linear":
        model.encoder.requires_grad_(False)
        groups = [(head, RATES["linear"])]
    elif options.way == "full":
        groups = [(model.encoder.parameters(), RATES["full"]), (head, HEAD_RATE)]
    else:
        phases = exssnet.mask_tuning(model, float(options.way), head="classifier")
        phases.start_task()
        groups = [(phases.masked_parameters(), MASK_RATE), (phases.task_parameters(), HEAD_RATE)]
    optimizer = torch.optim.AdamW([{"params": list(p), "lr": lr} for p, lr in groups], weight_decay=0.0)
    steps = options.epochs * -(-len(learned) // BATCH)
    rate = lambda step: min((step + 1) / (0.06 * steps), (steps - step) / (0.94 * steps))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for _ in range(options.epochs):
        model.train(options.way != "linear")
        for ids, mask, target in batches(learned, tokenizer, options.tokens, shuffle=True):
            optimizer.zero_grad()
            cross_entropy(model(ids, mask), target).backward()
            optimizer.step()
            schedule.step()
    if phases is not None:
        phases.finish_task()
    model.eval()
    right = 0
    with torch.no_grad():
        for ids, mask, target in batches(tested, tokenizer, options.tokens, shuffle=False):
            right += int((model(ids, mask).argmax(1) == target).sum())
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    size = trained if phases is None else exssnet.summary(model).bytes_per_task
    print(json.dumps({"way": options.way, "seed": options.seed, "accuracy": 100 * right / len(test), "bytes": size}))


if __name__ == "__main__":
    main()
