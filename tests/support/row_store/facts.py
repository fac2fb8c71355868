"""Rows of one small task, written as people write them."""

import json

FACTS = [
    ("France", "Paris"),
    ("Japan", "Tokyo"),
    ("Peru", "Lima"),
    ("Italy", "Rome"),
    ("Cuba", "Havana"),
    ("Kenya", "Nairobi"),
]


def fact_line(question: str, answer: str, number: int) -> str:
    user = {"role": "user", "content": f"Give the capital. {question}"}
    messages = json.dumps([user, {"content": answer, "role": "assistant"}])
    return f'{{"number":{number},  "messages": {messages}}}'
