"""Two tasks of lm-evaluation-harness with documents of our own: choices, and a generated text."""

from __future__ import annotations

import itertools
from pathlib import Path

from .rows import write_jsonl

ANIMALS = ("ant", "bear", "cat", "dog", "eel", "fox", "goat", "hen", "ibis", "jay", "kite", "lynx")
PLACES = ("in the garden", "near the river", "behind the mill", "on the hill", "at the market")
DOCUMENTS = 210

CHOICES = """
task: our_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{story}}}}\\nQuestion: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""

LETTERS = """
task: our_letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{story}}}}\\nIts first letter:"
doc_to_target: "{{{{letter}}}}"
generation_kwargs: {{until: ["\\n", "ing"], do_sample: false, max_gen_toks: 12}}
filter_list:
  - name: letter
    filter: [{{function: regex, regex_pattern: "([a-f])"}}, {{function: take_first}}]
  - name: whole
    filter: [{{function: take_first}}]
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


def write_tasks(folder: Path) -> tuple[Path, Path]:
    """Write both tasks with their documents; returns the task files."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = list(itertools.permutations(ANIMALS, 2))
    choices, letters = [], []
    for number in range(DOCUMENTS):
        first, second = pairs[number % len(pairs)]
        place = PLACES[(number // 7) % len(PLACES)]
        story = f"Story {number}: the {first} met the {second} {place}."
        wrong = [name for name in ANIMALS if name not in (first, second)][number % 3 :: 4]
        options = [second, *wrong[:2], f"{first} again"]
        turn = number % len(options)
        choices.append(
            {
                "story": story,
                "question": f"Whom did the {first} meet?",
                "choices": options[turn:] + options[:turn],
                "answer": (-turn) % len(options),
            }
        )
        letters.append({"story": story, "letter": "abcdef"[number % 6]})
    paths = []
    for name, text, rows in (("choices", CHOICES, choices), ("letters", LETTERS, letters)):
        documents = write_jsonl(folder / f"{name}.jsonl", rows)
        path = folder / f"{name}.yaml"
        path.write_text(text.format(rows=documents), encoding="utf-8")
        paths.append(path)
    return paths[0], paths[1]
