"""prepare-data: what goes in comes out of Megatron's own reader, and what is wrong is refused by name."""

from __future__ import annotations

import argparse
import bz2
import gzip
import json
import lzma
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_fope.common.errors import UserError
from megatron_fope.tools.cli import main
from megatron_fope.tools.data import command as cli
from megatron_fope.tools.data import prepare, prepare_data, read_sidecar

EOD = 256
TEXTS = ["plain", "naïve café — ünïcode 🙂", "line\r\nends\nkept\n", "\ufeffwith a mark"]


def documents(prefix: str | Path) -> list[np.ndarray]:
    """Every document's ids, by Megatron's reader."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    assert list(dataset.document_indices) == list(range(len(dataset) + 1))
    return [np.array(dataset[index]) for index in range(len(dataset))]


def texts(prefix: str | Path) -> list[bytes]:
    """Every document of a byte-level dataset, after checking that each has its end."""
    found = documents(prefix)
    assert all(ids[-1] == EOD and EOD not in ids[:-1] for ids in found)
    return [ids[:-1].astype(np.uint8).tobytes() for ids in found]


def write_jsonl(path: Path, values: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: value}) + "\n" for value in values), encoding="utf-8")
    return path


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def command(*flags: str | Path) -> int:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args([str(flag) for flag in flags]))


# What goes in comes out


def test_text_files_round_trip(tmp_path: Path, out: Path) -> None:
    files = []
    for number, text in enumerate(TEXTS):
        files.append(tmp_path / f"{number}.any")
        files[-1].write_bytes(text.encode())
    done = prepare_data(files, out / "data")
    assert texts(out / "data") == [text.encode() for text in TEXTS]
    assert (done.documents, done.vocab_size, done.eod_id, done.dtype) == (len(TEXTS), 257, EOD, "uint16")
    assert done.tokens == sum(len(text.encode()) + 1 for text in TEXTS)
    assert done.heldout is None
    assert done.train == prepare.WrittenDataset(str(out / "data"), len(TEXTS), done.tokens)
    assert left_behind(out) == ["data.bin", "data.idx", "data.json"]


def test_every_byte_of_utf8_survives(tmp_path: Path, out: Path) -> None:
    # One character of each length, over all lead and continuation bytes that UTF-8 has.
    text = "".join(map(chr, [*range(0x800), *range(0x800, 0xD800, 61), *range(0x10000, 0x110000, 4099)]))
    (tmp_path / "a.txt").write_bytes(text.encode())
    prepare_data(tmp_path / "a.txt", out / "data")
    assert texts(out / "data") == [text.encode()]


def test_folder_is_read_in_sorted_order_and_filtered(tmp_path: Path, out: Path) -> None:
    root = tmp_path / "corpus"
    names = ["b.txt", "a/z.md", "a/b/c.py", "a.txt", "test/t.txt", "a/test/u.txt", ".git/x.txt", "no.bin"]
    for name in reversed(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    prepare_data(root, out / "all")
    assert texts(out / "all") == [
        name.encode() for name in sorted(names) if name not in (".git/x.txt", "no.bin")
    ]
    prepare_data(root, out / "some", include=["*.txt", "*.md"], exclude=["test/*", "z.md"])
    assert texts(out / "some") == [b"a.txt", b"a/test/u.txt", b"b.txt"]


def test_a_file_reached_twice_is_read_once(tmp_path: Path, out: Path) -> None:
    root = tmp_path / "corpus"
    root.mkdir()
    (root / "a.txt").write_text("one")
    (root / "b.txt").symlink_to(root / "a.txt")
    prepare_data([root / "a.txt", root], out / "data")
    assert texts(out / "data") == [b"one"]


@pytest.mark.parametrize("key", ["text", "content"])
def test_jsonl_holds_a_document_per_line(tmp_path: Path, out: Path, key: str) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [*TEXTS, "  "], key)
    source.write_bytes(b"\xef\xbb\xbf" + source.read_bytes() + b"\n\n")
    done = prepare_data(source, out / "data", json_key=key)
    assert texts(out / "data") == [text.encode() for text in TEXTS]
    assert done.empty_documents == 1


def test_format_overrides_the_suffix(tmp_path: Path, out: Path) -> None:
    source = write_jsonl(tmp_path / "a.txt", ["x", "y"])
    prepare_data(source, out / "lines", input_format="jsonl")
    assert texts(out / "lines") == [b"x", b"y"]
    prepare_data(source, out / "whole")
    assert texts(out / "whole") == [source.read_bytes()]


@pytest.mark.parametrize("name", ["a.json", "a.JSON"])
@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", b"\n \n"])
def test_a_json_file_of_lines_is_jsonl(tmp_path: Path, out: Path, name: str, before: bytes) -> None:
    source = write_jsonl(tmp_path / name, ["x", "y"])
    source.write_bytes(before + source.read_bytes())
    prepare_data(source, out / "lines")
    assert texts(out / "lines") == [b"x", b"y"]
    prepare_data(source, out / "whole", input_format="text")
    assert texts(out / "whole") == [source.read_bytes()]


def test_no_append_eod(tmp_path: Path, out: Path) -> None:
    prepare_data(write_jsonl(tmp_path / "a.jsonl", ["x", "yz"]), out / "data", append_eod=False)
    assert [ids.tolist() for ids in documents(out / "data")] == [list(b"x"), list(b"yz")]


# Order and held-out text


def test_shuffle_keeps_the_documents_and_depends_only_on_the_seed(tmp_path: Path, out: Path) -> None:
    values = [f"document {number}" for number in range(50)]
    source = write_jsonl(tmp_path / "a.jsonl", values)
    orders = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare_data(source, out / name, shuffle_seed=seed)
        orders[name] = texts(out / name)
        assert sorted(orders[name]) == sorted(value.encode() for value in values)
    assert orders["a"] == orders["b"]
    assert orders["a"] != orders["c"]
    assert orders["a"] != [value.encode() for value in values]


def test_holdout_is_disjoint_complete_and_deterministic(tmp_path: Path, out: Path) -> None:
    values = [f"document {number}" for number in range(100)]
    # Copies of a text must not be on both sides.
    source = write_jsonl(tmp_path / "a.jsonl", values + values[:30])
    done = prepare_data(source, out / "a", holdout_fraction=0.1)
    train, heldout = texts(out / "a_train"), texts(out / "a_heldout")
    assert not set(train) & set(heldout)
    assert sorted(train + heldout) == sorted(value.encode() for value in values + values[:30])
    assert len(heldout) == 13
    assert done.heldout == prepare.WrittenDataset(
        str(out / "a_heldout"), 13, sum(len(text) + 1 for text in heldout)
    )
    assert done.train.documents == 117
    assert done.tokens == done.train.tokens + done.heldout.tokens
    assert not (out / "a.bin").exists()

    # Neither the order of reading nor a shuffle changes the sides; the seed does.
    backwards = write_jsonl(tmp_path / "b.jsonl", (values + values[:30])[::-1])
    prepare_data(backwards, out / "b", holdout_fraction=0.1, shuffle_seed=5)
    assert set(texts(out / "b_heldout")) == set(heldout)
    prepare_data(source, out / "c", holdout_fraction=0.1, holdout_seed=1)
    assert set(texts(out / "c_heldout")) != set(heldout)


def test_holdout_that_leaves_a_side_empty_is_refused(tmp_path: Path, out: Path) -> None:
    with pytest.raises(UserError, match=r"^--holdout-fraction: 0.5 of 1 documents"):
        prepare_data(write_jsonl(tmp_path / "a.jsonl", ["x"]), out / "data", holdout_fraction=0.5)
    with pytest.raises(UserError, match=r"^--holdout-fraction: 0.1 of 9 documents \(1 different\)"):
        prepare_data(write_jsonl(tmp_path / "b.jsonl", ["x"] * 9), out / "data", holdout_fraction=0.1)
    assert left_behind(out) == []


# Bad input


def not_utf8(folder: Path) -> tuple[Path, str]:
    (folder / "bad.txt").write_bytes(b"good until \xff here")
    return folder / "bad.txt", r"bad\.txt: not UTF-8: byte 0xff at offset 11"


def utf16(folder: Path) -> tuple[Path, str]:
    (folder / "bad.txt").write_bytes("text".encode("utf-16"))
    return folder / "bad.txt", r"bad\.txt: not UTF-8: byte 0xff at offset 0"


def broken_link(folder: Path) -> tuple[Path, str]:
    (folder / "bad.txt").symlink_to(folder / "nowhere")
    return folder / "bad.txt", r"bad\.txt: cannot be read"


def named_pipe(folder: Path) -> tuple[Path, str]:
    os.mkfifo(folder / "bad.txt")
    return folder / "bad.txt", r"bad\.txt: is not a regular file"


def bad_line(line: bytes, reason: str):
    def write(folder: Path) -> tuple[Path, str]:
        (folder / "bad.jsonl").write_bytes(b'{"text": "first"}\n' + line + b'\n{"text": "last"}\n')
        return folder / "bad.jsonl", rf"bad\.jsonl:2: {reason}"

    return write


def other_file(name: str, data: bytes, reason: str):
    def write(folder: Path) -> tuple[Path, str]:
        (folder / name).write_bytes(data)
        return folder / name, rf"{name}: {reason}"

    return write


def packed(name: str, data: bytes, kind: str):
    return other_file(
        name, data, rf"not UTF-8: byte .* of the file \(it looks like {kind}: make text or JSONL"
    )


_ARRAY = r"holds no JSON object in its first line, so it is not JSON Lines; .*--format text"
BAD = {
    "a JSON array": other_file("a.json", b'[{"text": "x"}, {"text": "y"}]', _ARRAY),
    "a JSON array over lines": other_file("a.json", b'[\n{"text": "x"},\n{"text": "y"}\n]', _ARRAY),
    "a JSON object over lines": other_file("a.json", b'{\n  "text": "x"\n}\n', _ARRAY),
    "JSON strings": other_file("a.json", b'"x"\n"y"\n', _ARRAY),
    "no JSON": other_file("a.json", b"text\n", _ARRAY),
    "gzip": packed("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n'), "gzip"),
    "xz": packed("a.txt.xz", lzma.compress(b"x"), "xz"),
    "bzip2": packed("a.bz2", bz2.compress(b"x"), "bzip2"),
    "Zstandard": packed("a.zst", b"\x28\xb5\x2f\xfd\x04\x00", "Zstandard"),
    "Parquet": packed("a.parquet", b"PAR1\x15\x04\x15\xffPAR1", "Parquet"),
    "UTF-16 by its mark": packed("a.txt", "x".encode("utf-16"), "UTF-16"),
    "not UTF-8": not_utf8,
    "UTF-16": utf16,
    "broken link": broken_link,
    "named pipe": named_pipe,
    "not JSON": bad_line(b'{"text": "x"', r"not JSON at column \d+"),
    "line not UTF-8": bad_line(b'{"text": "\xe9"}', r"not UTF-8: byte 0xe9 at offset 10 of the line"),
    "no such key": bad_line(b'{"body": "x"}', r"has no key 'text' \(--json-key\); it has 'body'"),
    "not a string": bad_line(b'{"text": 3}', r"the value of 'text' is a int, not a string"),
    "not an object": bad_line(b'["x"]', r"a JSON object is needed, this is a list"),
    "half a surrogate pair": bad_line(rb'{"text": "\ud800"}', "a lone surrogate at character 0"),
    "too deep": bad_line(b"[" * 200_000, "not readable as JSON"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_refused_or_skipped_by_name(
    tmp_path: Path, out: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in").mkdir()
    bad, message = BAD[kind](tmp_path / "in")
    (tmp_path / "in" / "good.txt").write_text("good")
    inputs = [tmp_path / "in" / "good.txt", bad]

    with pytest.raises(UserError, match=rf"^--input: .*{message}.*--on-bad-file skip") as refused:
        prepare_data(inputs, out / "data")
    assert "\n" not in str(refused.value)
    assert left_behind(out) == []

    done = prepare_data(inputs, out / "data", on_bad_file="skip")
    assert texts(out / "data") == [b"good", *([b"first", b"last"] if bad.suffix == ".jsonl" else [])]
    assert len(done.skipped) == 1
    assert f"skipped {done.skipped[0]}" in caplog.messages
    assert read_sidecar(out / "data")["sources"]["skipped"] == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads files whatever their mode")
def test_unreadable_file_is_refused(tmp_path: Path, out: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(UserError, match=r"^--input: .*a\.txt: cannot be read"):
        prepare_data(tmp_path / "a.txt", out / "data")


@pytest.mark.parametrize("on_bad_file", prepare.ON_BAD_FILE)
@pytest.mark.parametrize(("name", "data"), [("a.txt", b""), ("a.txt", b" \n\t\n"), ("a.jsonl", b"\n\n")])
def test_empty_corpus_is_refused(tmp_path: Path, out: Path, on_bad_file: str, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=r"^--input: no document in "):
        prepare_data(tmp_path / name, out / "data", on_bad_file=on_bad_file)
    assert left_behind(out) == []


def test_corpus_of_bad_files_only_is_refused_when_skipping(tmp_path: Path, out: Path) -> None:
    bad, message = not_utf8(tmp_path)
    with pytest.raises(UserError, match=rf"^--input: no document in .*1 skipped, the first: .*{message}"):
        prepare_data(bad, out / "data", on_bad_file="skip")
    assert left_behind(out) == []


def test_bad_arguments_name_their_flag(tmp_path: Path, out: Path) -> None:
    (tmp_path / "empty").mkdir()
    source = write_jsonl(tmp_path / "a.jsonl", ["x"])
    cases = [
        (tmp_path / "none.txt", "data", {}, "--input: .*none.txt does not exist"),
        (tmp_path / "empty", "data", {}, r"--input: no file in .*empty matches --include \*\.txt"),
        (source, "data.bin", {}, "--output-prefix: .* leave out the suffix"),
        (source, "data/", {}, "--output-prefix: .* needs a file name"),
        (source, "data", {"on_bad_file": "drop"}, "--on-bad-file is 'drop'; allowed: refuse, skip"),
        (source, "data", {"input_format": "csv"}, "--format is 'csv'; allowed: auto, text, jsonl"),
        (source, "data", {"holdout_fraction": 1.0}, "--holdout-fraction is 1.0; allowed: 0 to"),
        (source, "data", {"holdout_fraction": float("nan")}, "--holdout-fraction is nan; allowed: 0 to"),
        (source, "data", {"workers": 0}, "--workers is 0; allowed: 1 to "),
        (source, "data", {"eod_token": "</s>"}, "--eod-token: '</s>' given, but --tokenizer bytes"),
        (source, "data", {"tokenizer": "gpt2"}, "--tokenizer: 'gpt2' is neither 'bytes' nor an existing"),
    ]
    for given, prefix, options, message in cases:
        with pytest.raises(UserError, match="^" + message) as refused:
            prepare_data(given, f"{out}/{prefix}", **options)
        assert "\n" not in str(refused.value)
    assert left_behind(out) == []


# Nothing is lost


def test_existing_output_is_kept_unless_overwrite(tmp_path: Path, out: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", ["first"])
    second = write_jsonl(tmp_path / "b.jsonl", ["second"])
    prepare_data(first, out / "data")
    with pytest.raises(UserError, match=r"^--output-prefix: .*data\.json exists; .*--overwrite"):
        prepare_data(second, out / "data")
    assert texts(out / "data") == [b"first"]
    prepare_data(second, out / "data", overwrite=True)
    assert texts(out / "data") == [b"second"]
    assert left_behind(out) == ["data.bin", "data.idx", "data.json"]


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
def test_any_existing_file_of_the_output_is_kept(tmp_path: Path, out: Path, suffix: str) -> None:
    (out / f"data{suffix}").write_text("precious")
    with pytest.raises(UserError, match=rf"^--output-prefix: .*data\{suffix} exists"):
        prepare_data(write_jsonl(tmp_path / "a.jsonl", ["x"]), out / "data")
    assert (out / f"data{suffix}").read_text() == "precious"


def test_a_request_to_end_leaves_nothing(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM, as a scheduler sends it, while documents are written."""
    monkeypatch.setattr(prepare, "_add_documents", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    source = write_jsonl(tmp_path / "a.jsonl", ["x"])
    with pytest.raises(SystemExit) as stop:
        main(
            ["prepare-data", "--input", str(source), "--output-prefix", str(out / "new" / "folder" / "data")]
        )
    assert stop.value.code == 143 and capsys.readouterr().err == "megatron-fope: terminated\n"
    assert left_behind(out) == []


def test_what_a_killed_run_left_is_mentioned(
    tmp_path: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And kept: another run may be at work there."""
    (out / ".data.partial-abc").mkdir()
    (out / ".data.partial-abc" / "all.bin").write_bytes(b"half")
    prepare_data(write_jsonl(tmp_path / "a.jsonl", ["x", "y"]), out / "data", holdout_fraction=0.5)
    assert [
        text for text in caplog.messages if text.startswith(f"{out}/.data.partial-abc: another run works")
    ]
    assert (out / ".data.partial-abc" / "all.bin").exists()


def test_a_folder_in_place_of_a_file_of_the_output(tmp_path: Path, out: Path) -> None:
    """Found before anything is written: ``--overwrite`` would remove the index and then fail."""
    source = write_jsonl(tmp_path / "a.jsonl", ["x"])
    prepare_data(source, out / "data")
    (out / "data.bin").unlink()
    (out / "data.bin").mkdir()
    with pytest.raises(UserError, match=r"^--output-prefix: .*data\.bin is a folder"):
        prepare_data(source, out / "data", overwrite=True)
    assert left_behind(out) == ["data.bin", "data.idx", "data.json"]


def test_encoding_that_is_left_half_way_disturbs_no_other() -> None:
    from megatron_fope.tools.data.tokenizers import encode_documents, load_tokenizer

    tokenizer, documents, before = load_tokenizer("bytes"), [b"one", b"two"], dict(os.environ)
    first = encode_documents(tokenizer, documents, np.uint16)
    next(first)
    second = encode_documents(tokenizer, documents, np.uint16)
    next(second)
    first.close()
    assert len(list(second)) == 1 and dict(os.environ) == before


def test_an_input_is_never_replaced(out: Path) -> None:
    source = write_jsonl(out / "data.json", ["x"])
    before = source.read_bytes()
    with pytest.raises(UserError, match=r"^--output-prefix: .*data\.json would replace an input file"):
        prepare_data(source, out / "data", input_format="jsonl", overwrite=True)
    assert source.read_bytes() == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("at", ["document", "index"])
def test_an_interrupted_run_leaves_the_old_dataset_and_nothing_else(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, at: str
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two", "three"])
    prepare_data(source, out / "old")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    calls = 0
    real = IndexedDatasetBuilder.add_document

    def fails_at_the_second(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise error
        real(self, *args, **kwargs)

    def fails(self, path):
        Path(path).write_bytes(b"half an index")
        raise error

    if at == "document":
        monkeypatch.setattr(IndexedDatasetBuilder, "add_document", fails_at_the_second)
    else:
        monkeypatch.setattr(IndexedDatasetBuilder, "finalize", fails)
    for prefix in ("old", "new"):
        calls = 0
        expected = KeyboardInterrupt if error is KeyboardInterrupt else UserError
        with pytest.raises(expected) as stopped:
            prepare_data(source, out / prefix, overwrite=True)
        if expected is UserError:
            assert "--output-prefix: cannot write" in str(stopped.value)
            assert "No space left on device" in str(stopped.value)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not IndexedDataset.exists(str(out / "new"))


def test_while_moving_no_old_index_is_next_to_new_data(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prepare_data(write_jsonl(tmp_path / "a.jsonl", ["one"]), out / "data")
    real = os.replace

    def dies_after_the_data(source: str, target: str) -> None:
        real(source, target)
        if target.endswith(".bin"):
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", dies_after_the_data)
    with pytest.raises(KeyboardInterrupt):
        prepare_data(write_jsonl(tmp_path / "b.jsonl", ["longer"]), out / "data", overwrite=True)
    assert not IndexedDataset.exists(str(out / "data"))


def test_stale_index_cache_is_pointed_out(
    tmp_path: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["x"])
    prepare_data(source, out / "data")
    assert not caplog.messages
    # Where Megatron's GPTDataset puts its sample indices unless --data-cache-path is given.
    (out / "data" / "cache").mkdir(parents=True)
    prepare_data(source, out / "data", overwrite=True)
    assert any("data/cache" in message and "delete" in message for message in caplog.messages)


# The sidecar, the flags and the command


def test_sidecar(tmp_path: Path, out: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["x", "yz", ""])
    prepare_data(source, out / "data")
    sidecar = read_sidecar(out / "data")
    assert sidecar["tokenizer"] == {
        "kind": "bytes",
        "path": None,
        "sha256": None,
        "vocab_size": 257,
        "eod_id": EOD,
        "eod_token": None,
        "append_eod": True,
    }
    assert (sidecar["split"], sidecar["documents"], sidecar["tokens"]) == ("all", 2, 5)
    assert sidecar["sources"]["empty_documents"] == 1
    assert sidecar["sources"]["text_bytes"] == 3

    def digest(name: str, values: list[str]) -> str:
        prepare_data(write_jsonl(tmp_path / f"{name}.jsonl", values), out / name)
        return read_sidecar(out / name)["sources"]["sha256"]

    assert digest("same", ["x", "yz"]) == sidecar["sources"]["sha256"]
    assert digest("other", ["xy", "z"]) != sidecar["sources"]["sha256"]

    prepare_data(source, out / "h", holdout_fraction=0.5)
    assert read_sidecar(out / "h_train")["split"] == "train"
    assert read_sidecar(out / "h_heldout")["split"] == "heldout"
    assert read_sidecar(out / "h_heldout")["documents"] == 1


def test_sidecar_of_something_else(out: Path) -> None:
    assert read_sidecar(out / "none") is None
    for text in ("{", "[]", '{"format_version": 99}'):
        (out / "odd.json").write_text(text)
        with pytest.raises(UserError, match=r"odd\.json"):
            read_sidecar(out / "odd")


def test_printed_flags_give_megatron_this_vocabulary(tmp_path: Path, out: Path) -> None:
    from megatron.core.tokenizers import MegatronTokenizer

    done = prepare_data(write_jsonl(tmp_path / "a.jsonl", ["x"]), out / "data")
    assert done.train_flags[:3] == ("--tokenizer-type", "NullTokenizer", "--vocab-size")
    tokenizer = MegatronTokenizer.from_pretrained(
        metadata_path={"library": "null-text"}, vocab_size=int(done.train_flags[3])
    )
    assert tokenizer.eod == EOD
    assert tokenizer.vocab_size == 257


def test_command(tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    not_utf8(tmp_path / "in")
    write_jsonl(tmp_path / "in" / "a.jsonl", ["x", "y", "z", ""])
    flags = ["--input", tmp_path / "in", "--output-prefix", out / "data"]
    with pytest.raises(UserError, match="--on-bad-file skip"):
        command(*flags)
    assert command(*flags, "--on-bad-file", "skip", "--holdout-fraction", "0.3", "--shuffle-seed", "1") == 0
    printed = capsys.readouterr().out
    assert "1 empty documents and 1 bad files" in printed
    assert f"wrote {out}/data_train.bin, .idx, .json: 2 documents, 4 tokens (uint16)" in printed
    assert f"wrote {out}/data_heldout.bin, .idx, .json: 1 documents, 2 tokens (uint16)" in printed
    assert f"train with: --data-path {out}/data_train --tokenizer-type NullTokenizer --vocab-size" in printed


def test_progress_bar_counts_every_byte(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["x" * 1000] * 10)
    prepare_data(source, out / "data", show_progress=True)
    assert "prepare-data: 100%" in capsys.readouterr().err


# Hugging Face tokenizers


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small byte-level BPE trained here, stored with truncation on."""
    import tokenizers as library

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|other|>"],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(prepare.__file__).read_text(encoding="utf-8")], trainer)
    tokenizer.enable_truncation(8)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


LONG = [
    f"{text} and a document that is longer than the truncation, {number}" for number, text in enumerate(TEXTS)
]


def check_hugging_face(prefix: Path, folder: Path, end: int = 0) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = documents(prefix)
    assert [int(ids[-1]) for ids in found] == [end] * len(LONG)
    assert [tokenizer.decode(ids[:-1].tolist()) for ids in found] == LONG
    # Merged, or else this tests only bytes again.
    assert sum(map(len, found)) < 0.9 * sum(len(text.encode()) for text in LONG)


@pytest.mark.parametrize("workers", [1, 2])
def test_tokenizer_json(tmp_path: Path, out: Path, hugging_face: Path, workers: int) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", LONG)
    done = prepare_data(source, out / "data", tokenizer=hugging_face / "tokenizer.json", workers=workers)
    check_hugging_face(out / "data", hugging_face)
    assert (done.vocab_size, done.eod_id, done.dtype) == (400, 0, "uint16")
    assert done.train_flags == (
        "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(hugging_face),
    )  # fmt: skip
    described = read_sidecar(out / "data")["tokenizer"]
    assert (described["kind"], described["eod_token"]) == ("huggingface", "<|end|>")
    assert len(described["sha256"]) == 64


def test_workers_keep_the_order_and_pass_on_bad_files(
    tmp_path: Path, out: Path, hugging_face: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_fope.tools.data import tokenizers

    monkeypatch.setattr(tokenizers, "_CHUNK_BYTES", 64)
    source = write_jsonl(tmp_path / "a.jsonl", [f"document number {number}" for number in range(200)])
    for workers in (1, 2):
        prepare_data(source, out / str(workers), tokenizer=hugging_face / "tokenizer.json", workers=workers)
    assert (out / "1.bin").read_bytes() == (out / "2.bin").read_bytes()
    bad, message = not_utf8(tmp_path)
    with pytest.raises(UserError, match=message):
        prepare_data([source, bad], out / "3", tokenizer=hugging_face / "tokenizer.json", workers=2)


def test_the_tokenizer_is_never_replaced(tmp_path: Path, hugging_face: Path) -> None:
    """``tokenizer.json`` is what a dataset of that prefix would write, too."""
    before = (hugging_face / "tokenizer.json").read_bytes()
    source = write_jsonl(tmp_path / "a.jsonl", LONG)
    for tokenizer in (hugging_face / "tokenizer.json", hugging_face):
        with pytest.raises(UserError, match=r"tokenizer\.json would replace an input file"):
            prepare_data(source, hugging_face / "tokenizer", tokenizer=tokenizer, overwrite=True)
    assert (hugging_face / "tokenizer.json").read_bytes() == before


def test_tokenizer_folder_agrees_with_megatron(tmp_path: Path, out: Path, hugging_face: Path) -> None:
    from megatron.core.tokenizers import MegatronTokenizer

    done = prepare_data(write_jsonl(tmp_path / "a.jsonl", LONG), out / "data", tokenizer=hugging_face)
    check_hugging_face(out / "data", hugging_face)
    tokenizer = MegatronTokenizer.from_pretrained(
        tokenizer_path=done.train_flags[3], metadata_path={"library": "huggingface"}
    )
    assert (tokenizer.eod, tokenizer.vocab_size) == (done.eod_id, done.vocab_size)
    assert tokenizer.tokenize(LONG[1]) == documents(out / "data")[1][:-1].tolist()


def test_eod_token(tmp_path: Path, out: Path, hugging_face: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", LONG)
    model = hugging_face / "tokenizer.json"
    prepare_data(source, out / "other", tokenizer=model, eod_token="<|other|>")
    check_hugging_face(out / "other", hugging_face, end=1)
    assert any("Megatron takes the eos_token" in message for message in caplog.messages)
    with pytest.raises(UserError, match=r"^--eod-token: '<none>' is not in the vocabulary"):
        prepare_data(source, out / "none", tokenizer=model, eod_token="<none>")

    alone = tmp_path / "alone.json"
    alone.write_bytes(model.read_bytes())
    with pytest.raises(UserError, match=r"^--tokenizer: .*alone\.json names no EOS token .*--eod-token"):
        prepare_data(source, out / "alone", tokenizer=alone)
    done = prepare_data(source, out / "alone", tokenizer=alone, append_eod=False)
    assert done.eod_id is None


def test_tokenizer_that_does_not_load_is_refused(tmp_path: Path, out: Path, hugging_face: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"^--tokenizer: .* is not a tokenizer\.json") as refused:
        prepare_data(source, out / "data", tokenizer=tmp_path / "tokenizer.json")
    assert "\n" not in str(refused.value)


def test_missing_library_says_how_to_get_it(
    tmp_path: Path, out: Path, hugging_face: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["x"])
    for library, model in (("tokenizers", hugging_face / "tokenizer.json"), ("transformers", hugging_face)):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, library, None)
            with pytest.raises(UserError, match=rf"{library} library; pip install 'megatron-fope\[hf\]'"):
                prepare_data(source, out / "data", tokenizer=model)
