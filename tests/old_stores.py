"""A store of format version 1, byte by byte as megasft wrote it before turns had weights."""

from pathlib import Path

import orjson

PREFIX = "4d4d494449445800000100000000000000"  # MMIDIDX, version 1
NUMBERS = "0000000000000000010000000000000002000000000000000300000000000000"  # of the documents

FILES = {
    # 5 6 7 | 8 | 9 3 3 9
    "tokens.bin": "05000600070008000900030003000900",
    "tokens.idx": PREFIX
    + "0803000000000000000400000000000000030000000100000004000000"
    + "000000000000000006000000000000000800000000000000"
    + NUMBERS,
    # start, num_tokens, category_id, message of one turn | none | two turns
    "turns.bin": "01000000020000000000000001000000"
    + "01000000010000000200000000000000"
    + "03000000010000000200000002000000",
    "turns.idx": PREFIX
    + "0403000000000000000400000000000000040000000000000008000000"
    + "000000000000000010000000000000001000000000000000"
    + NUMBERS,
}
LINEAGE = b"\x93NUMPY\x01\x00v\x00{'descr': '<i8', 'fortran_order': False, 'shape': (3, 2), }"
META = {
    "format_version": 1,
    "fingerprint": "00d0728798d2aab783f092396a0c6d07",
    "turn_fields": ["start", "num_tokens", "category_id", "message"],
    "vocab_size": 100,
    "tokenizer": {"sha256": "t", "chat_template_sha256": "c"},
    "special_tokens": {"pad": 0, "end_of_turn": [9]},
    "categories": {"2": "maths"},
    "counts": {"samples": 3},
    "sources": [{"path": "old.jsonl"}],
}
TURNS = [[[1, 2, 0, 1]], [], [[1, 1, 2, 0], [3, 1, 2, 2]]]
PLAN = (
    "plan version 1, balanced, store 00d0728798d2aab783f092396a0c6d07, 3 samples, row_tokens 8, "
    "align_tokens 2, seed 3"
)
"""Its identity, as runs of that time have it in their checkpoints."""


def write_version_1(path: Path) -> Path:
    """Write the store: samples of lines 10, 11 and 12."""
    path.mkdir(parents=True)
    for name, data in FILES.items():
        (path / name).write_bytes(bytes.fromhex(data))
    places = b"".join(n.to_bytes(8, "little") for i in range(3) for n in (0, 10 + i))
    (path / "lineage.npy").write_bytes(LINEAGE.ljust(127) + b"\n" + places)
    (path / "store.json").write_bytes(orjson.dumps(META, option=orjson.OPT_INDENT_2) + b"\n")
    return path
