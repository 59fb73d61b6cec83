"""Chat templates, against transformers: what they are given, where they are found, and what they may not do."""

import json
import sys

import pytest
from tokenizer_vectors import merges_of, vectors, write_directory, write_json
from untyped import untyped

from sqjax.models import text
from sqjax.models.text.chat import Template, Templates
from sqjax.models.tokenizer import Tokenizer, from_directory, from_gguf_metadata

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

USER = [{"role": "user", "content": "Hi"}]


def of(*sources, **named):
    """A tokenizer that holds templates alone."""
    named |= dict.fromkeys(["default"] if sources else [], *sources)
    found = {name: Template(text, f"file of {name}") for name, text in named.items()}
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(None, None, templates=Templates(found, tokens))


@pytest.mark.parametrize(("template", "chat", "text"), vectors("chats")["rendered"])
def test_renders_as_transformers(template, chat, text):
    expected = vectors("chats")
    arguments = dict(expected["chats"][chat])
    tokenizer = of(expected["templates"][template])
    assert tokenizer.chat(arguments.pop("messages"), **arguments) == text


def test_a_template_refuses_messages():
    strict = of(vectors("chats")["templates"]["strict"])
    with pytest.raises(
        ValueError, match=r"file of default: .*refuses these messages: roles must alternate"
    ):
        strict.chat([*USER, *USER])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ self.__init__ }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({}) }}",
        "{% include 'secret' %}",
        "{% import 'os' as os %}",
        "{% extends 'secret' %}",
        "{{ range(10000000) | list }}",
        "{{ raise_exception.__globals__ }}",
        "{% for %}",
        "{{ 1 / 0 }}",
        "{{ none.strip() }}",
    ],
)
def test_what_a_template_may_not_do(source):
    messages = [dict(USER[0])]
    with pytest.raises(ValueError, match="file of default: the chat template can not be rendered"):
        of(source).chat(messages)
    assert messages == USER


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"messages: expected a list such as .*, got \[\]"),
        ("Hi", "messages: expected a list"),
        (None, "messages: expected a list"),
        (USER[0], "messages: expected a list"),
        (["Hi"], r"messages\[0\]: expected \{\"role\": ..., \"content\": ...\}, got 'Hi'"),
        ([USER], r"messages\[0\]: expected \{\"role\""),
        (
            [*USER, {"content": "Hi"}],
            r"messages\[1\]: role: expected a text such as 'user', got None",
        ),
        (
            [{"role": "user"}],
            r"messages\[0\]: content: expected a text, or a list of parts, got None",
        ),
        ([{"role": "user", "content": 5}], r"messages\[0\]: content: expected a text"),
        ([{"role": "user", "content": ["Hi"]}], r"messages\[0\]: content: expected a text"),
        ([{"role": "user", "content": b"x" * 90}], r"got b'x{58}\.\.\."),
    ],
)
def test_what_is_no_conversation(messages, message):
    with untyped(), pytest.raises(ValueError, match=message):
        of("{{ messages }}").chat(messages)


@pytest.mark.parametrize(
    ("tools", "message"),
    [("f", "tools: expected a list"), ([len], "tools: expected a list of JSON schemas")],
)
def test_what_is_no_tool(tools, message):
    with untyped(), pytest.raises(ValueError, match=message):
        of("{{ tools }}").chat(USER, tools=tools)


def test_templates_by_name():
    tokenizer = of("usual {{ x }}", tool_use="tools", rag="rag")
    assert tokenizer.chat(USER, x=3) == "usual 3"
    assert tokenizer.chat(USER, tools=[{}]) == "tools"
    assert tokenizer.chat(USER, template="rag") == "rag"
    assert tokenizer.chat(USER, template="{{ bos_token }}{{ messages[0].role }}") == "<s>user"
    with pytest.raises(
        ValueError, match=r"template: expected one of \['default', 'rag', 'tool_use'\], .* got 'no'"
    ):
        tokenizer.chat(USER, template="no")
    with pytest.raises(ValueError, match=r"no usual template; name one of \['rag'\]"):
        of(rag="rag").chat(USER)
    for none in (Tokenizer(None, None), of()):
        with pytest.raises(ValueError, match=r"has no chat template .*give one as template="):
            none.chat(USER)
    with (
        untyped(),
        pytest.raises(ValueError, match="template: expected a text, got 5"),
    ):
        tokenizer.chat(USER, template=5)


def test_ids_of_a_chat_begin_once(tmp_path):
    write_directory(tmp_path, "llama3")
    source = "{{ bos_token }}{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(source)
    tokenizer = from_directory(tmp_path)
    text = tokenizer.chat(USER)
    assert text == "<|begin|>Hi<|end|>"
    assert tokenizer.encode("Hi")[0] == 0
    assert tokenizer.encode_chat(USER) == [*tokenizer.encode("Hi"), 1]
    with pytest.raises(ValueError, match="encode_chat: expected a text of Unicode"):
        tokenizer.encode_chat([{"role": "user", "content": "\ud800"}])


def test_where_templates_are_found(tmp_path):
    """Files of their own count most; each is named if it fails."""
    config = write_directory(tmp_path, "gpt2") / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    assert not from_directory(tmp_path).templates.named
    write_json(tmp_path, chat_template={"chat_template": "old"})
    assert from_directory(tmp_path).chat(USER) == "old"
    write_json(tmp_path, tokenizer_config=settings | {"chat_template": "of the settings"})
    assert from_directory(tmp_path).chat(USER) == "of the settings"
    named = [
        {"name": "default", "template": "first"},
        {"name": "tool_use", "template": "{{ ''.__class__ }}"},
    ]
    write_json(tmp_path, tokenizer_config=settings | {"chat_template": named})
    tokenizer = from_directory(tmp_path)
    assert tokenizer.chat(USER) == "first"
    with pytest.raises(
        ValueError, match=r"tokenizer_config\.json: chat_template 'tool_use': .*__class__"
    ):
        tokenizer.chat(USER, tools=[{}])
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "chat_template.jinja").write_text("a\r\nfile")
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("{{ ''.__class__ }}")
    tokenizer = from_directory(tmp_path)
    assert tokenizer.chat(USER) == "a\nfile"
    assert sorted(tokenizer.templates.named) == ["default", "rag"]
    with pytest.raises(ValueError, match=r"additional_chat_templates/rag\.jinja: .*__class__"):
        tokenizer.chat(USER, template="rag")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (5, "chat_template: expected a text, or a list of"),
        ([5], "chat_template: expected a text, or a list of {name, template}, both texts, got .5"),
        (
            [{"name": "a"}],
            "chat_template: expected a text, or a list of {name, template}, both texts",
        ),
    ],
)
def test_what_is_no_template(template, message, tmp_path):
    write_directory(tmp_path, "gpt2")
    write_json(tmp_path, tokenizer_config={"chat_template": template})
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json: {message}"):
        from_directory(tmp_path)


def test_a_file_that_is_no_utf8(tmp_path):
    write_directory(tmp_path, "gpt2")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja: expected a template in UTF-8"):
        from_directory(tmp_path)


def test_tokens_that_templates_may_name(tmp_path):
    write_directory(tmp_path, "gpt2")
    config = {
        "bos_token": {"content": "<|begin|>"},
        "unk_token": "<none>",
        "additional_special_tokens": ["<a>", {"content": "<b>"}],
        "extra_special_tokens": {"image_token": "<image>"},
        "chat_template": "{{ bos_token }}{{ unk_token }}{{ eos_token }}{{ additional_special_tokens }}{{ image_token }}",
    }
    write_json(tmp_path, tokenizer_config=config)
    assert from_directory(tmp_path).chat(USER) == "<|begin|><none>['<a>', '<b>']<image>"


def test_templates_of_gguf():
    vocabulary, merges = merges_of("gpt2")
    tokens = sorted(vocabulary, key=vocabulary.get)
    tokenizer = from_gguf_metadata(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [3, 3, *[1] * (len(tokens) - 2)],
            "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 1,
            "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
            "tokenizer.chat_template.tool_use": "{{ ''.__class__ }}",
        },
        "model.gguf",
    )
    assert tokenizer.chat(USER) == "<|begin|>Hi<|end|>"
    with pytest.raises(ValueError, match=r"model\.gguf: chat template 'tool_use': "):
        tokenizer.chat(USER, tools=[{}])


def test_without_jinja2(monkeypatch):
    monkeypatch.delitem(sys.modules, "sqjax.models.text.sandbox", raising=False)
    monkeypatch.delattr(text, "sandbox", raising=False)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"needs `jinja2`: pip install sqjax\[demo\]"):
        of("x").chat(USER)
