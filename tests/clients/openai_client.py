"""The official client: completions, chat, streaming, log-probabilities, errors.

    python openai_client.py URL
"""

import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0)
model = client.models.list().data[0].id
assert client.models.retrieve(model).id == model
MESSAGES = [
    {"role": "system", "content": "You rewrite prompts."},
    {"role": "user", "content": [{"type": "text", "text": "a cat in the rain"}]},
]

# completions: several prompts and candidates, the prompt itself, log-probabilities
answer = client.completions.create(
    model=model, prompt=["a cat", "a dog"], n=2, max_tokens=8, seed=3, logprobs=2, echo=True
)
assert [c.index for c in answer.choices] == [0, 1, 2, 3]
assert [c.text[:5] for c in answer.choices] == ["a cat", "a cat", "a dog", "a dog"]
for choice in answer.choices:
    scores = choice.logprobs
    assert (
        len(scores.tokens)
        == len(scores.token_logprobs)
        == len(scores.top_logprobs)
        == len(scores.text_offset)
    )
    assert scores.token_logprobs[0] is None and all(v <= 0 for v in scores.token_logprobs[1:])
    assert "".join(scores.tokens) == choice.text, (scores.tokens, choice.text)
    assert all(choice.text[o:].startswith(t) for o, t in zip(scores.text_offset, scores.tokens))
    for own, likely in zip(scores.token_logprobs[1:], scores.top_logprobs[1:]):
        assert 2 <= len(likely) <= 3 and own in likely.values()
usage = answer.usage
assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens

# only the prompt's log-probabilities
scored = client.completions.create(
    model=model, prompt="a cat in the rain", max_tokens=0, echo=True, logprobs=0
)
assert scored.choices[0].text == "a cat in the rain" and len(scored.choices[0].logprobs.tokens) == 5

# token ids as prompts, stops, biases, penalties
ids = [300, 301, 302]
banned = client.completions.create(
    model=model,
    prompt=ids,
    max_tokens=20,
    temperature=0,
    logit_bias={"5": -100},
    presence_penalty=1.5,
)
assert banned.usage.prompt_tokens == 3
plain = client.completions.create(
    model=model, prompt="a cat, a dog, a", max_tokens=40, temperature=0
).choices[0]
stopped = client.completions.create(
    model=model, prompt="a cat, a dog, a", max_tokens=40, temperature=0, stop=plain.text[3:6]
).choices[0]
assert (
    plain.text.startswith(stopped.text)
    and len(stopped.text) <= 5
    and stopped.finish_reason == "stop"
), (plain, stopped)

# chat: whole and in pieces
whole = client.chat.completions.create(
    model=model, messages=MESSAGES, seed=7, logprobs=True, top_logprobs=3, n=2
)
first = whole.choices[0]
assert first.message.role == "assistant" and "cat" in first.message.content
assert first.finish_reason in ("stop", "length")
assert all(
    len(t.top_logprobs) == 3 and bytes(t.bytes).decode() == t.token for t in first.logprobs.content
)
pieces = list(
    client.chat.completions.create(
        model=model,
        messages=MESSAGES,
        seed=7,
        logprobs=True,
        top_logprobs=3,
        n=2,
        stream=True,
        stream_options={"include_usage": True},
    )
)
for choice in whole.choices:
    own = [p.choices[0] for p in pieces if p.choices and p.choices[0].index == choice.index]
    assert own[0].delta.role == "assistant"
    assert "".join(p.delta.content or "" for p in own) == choice.message.content
    tokens = [t.token for p in own for t in (p.logprobs.content if p.logprobs else [])]
    assert tokens == [t.token for t in choice.logprobs.content]
    assert [p.finish_reason for p in own if p.finish_reason] == [choice.finish_reason]
assert (
    pieces[-1].usage == whole.usage
    or pieces[-1].usage.completion_tokens == whole.usage.completion_tokens
)

# completions in pieces
request = dict(model=model, prompt="a castle", max_tokens=12, seed=2, echo=True, logprobs=1)
text = client.completions.create(**request).choices[0].text
assert "".join(p.choices[0].text for p in client.completions.create(**request, stream=True)) == text

# breaking off
for piece in client.completions.create(
    model=model, prompt="a", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
):
    break

# errors
for wrong, kind, param in [
    (dict(temperature=-1), openai.BadRequestError, "temperature"),
    (dict(model="other"), openai.NotFoundError, "model"),
    (dict(prompt=""), openai.BadRequestError, "prompt"),
    (dict(prompt=[10**9]), openai.BadRequestError, None),
    (dict(prompt="a " * 3000), openai.BadRequestError, None),
    (dict(max_tokens="many"), openai.BadRequestError, None),
    (dict(logprobs=100), openai.BadRequestError, "logprobs"),
]:
    try:
        client.completions.create(**{"model": model, "prompt": "x", **wrong})
        raise SystemExit(f"{wrong} was accepted")
    except kind as e:
        assert e.body["message"] and e.body["type"] == "invalid_request_error", e.body
        assert param is None or e.body["param"] == param, e.body
print("openai client: ok")
