"""What `--data` names."""

from itertools import islice

import pytest

from kvferry.cli.data import source_named
from kvferry.errors import FolderError
from kvferry.lab.align.stories import stories
from kvferry.models.load import load
from kvferry.train.examples import Places


def test_names_of_sources_are_those_of_fits():
    llama = load("llama")
    assert source_named("places", llama, llama) == Places()


def test_stories_are_none_that_benchmarks_test_on(shared_dir):
    small = load(str(shared_dir / "models" / "stories260K"))
    source = source_named("stories", small, small)
    tested = {story.replace("\n", " ")[:150] for story in stories("test")}
    train = [story.replace("\n", " ") for story in stories("train")]
    for example in islice(source.examples("train", 0), 20):
        start = example.context.replace("\n", " ")[:150]
        assert start not in tested
        assert any(start in story for story in train)


def test_stories_without_a_shared_folder_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("KVFERRY_SHARED", str(tmp_path / "none"))
    stories.cache_clear()
    llama = load("llama")
    try:
        with pytest.raises(FolderError, match="stories"):
            source_named("stories", llama, llama)
    finally:
        stories.cache_clear()
