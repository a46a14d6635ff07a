"""Drives a running `cotk serve` with the openai package and prints what it got as one JSON object.

usage: openai_client.py BASE_URL MODEL PROMPT MAX_TOKENS CONTEXT

Judges nothing but exception classes: the laws stand in tests/all/serve.rs.
"""

import json
import sys
import threading

import openai

base_url, model, prompt, max_tokens, context = sys.argv[1:]
max_tokens, context = int(max_tokens), int(context)
client = openai.OpenAI(base_url=base_url + "/v1", api_key="unused", max_retries=0, timeout=60)
messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}]


def mode(name):
    return {"extra_body": {"cotk": {"mode": name}}}


def greedy(**more):
    return {"model": model, "max_tokens": max_tokens, "temperature": 0, **more}


def joined(stream, text):
    pieces, finish, usage, own = [], None, None, None
    for chunk in stream:
        for choice in chunk.choices:
            pieces.append(text(choice) or "")
            finish = choice.finish_reason or finish
        usage = chunk.usage or usage
        own = getattr(chunk, "cotk", None) or own
    return {
        "text": "".join(pieces),
        "pieces": len(pieces),
        "finish": finish,
        "usage": usage.model_dump() if usage else None,
        "cotk": own,
    }


def whole(reply, text):
    return {
        "text": text(reply.choices[0]),
        "finish": reply.choices[0].finish_reason,
        "usage": reply.usage.model_dump(),
        "cotk": reply.cotk,
    }


got = {"models": [entry.id for entry in client.models.list()], "model": client.models.retrieve(model).id}

for name in ["exact", "little"]:
    reply = client.completions.create(**greedy(prompt=prompt, logprobs=2), **mode(name))
    got[name] = whole(reply, lambda choice: choice.text)
    got[name]["logprobs"] = reply.choices[0].logprobs.token_logprobs
    got[name]["tokens"] = reply.choices[0].logprobs.tokens
    stream = client.completions.create(
        **greedy(prompt=prompt, stream=True, stream_options={"include_usage": True}), **mode(name)
    )
    got[name]["streamed"] = joined(stream, lambda choice: choice.text)

reply = client.chat.completions.create(**greedy(messages=messages, logprobs=True, top_logprobs=3))
got["chat"] = whole(reply, lambda choice: choice.message.content)
got["chat"]["role"] = reply.choices[0].message.role
got["chat"]["top_logprobs"] = [len(token.top_logprobs) for token in reply.choices[0].logprobs.content]
stream = client.chat.completions.create(
    **greedy(messages=messages, stream=True, stream_options={"include_usage": True})
)
got["chat"]["streamed"] = joined(stream, lambda choice: choice.delta.content)

sampled = lambda seed: client.completions.create(
    model=model, prompt=prompt, max_tokens=max_tokens, temperature=1.0, top_p=0.95, seed=seed
).choices[0].text
got["seeds"] = [sampled(1), sampled(1), sampled(2)]

stop = got["exact"]["text"][3:5]
reply = client.completions.create(**greedy(prompt=prompt, stop=[stop]))
got["stop"] = {"stop": stop, **whole(reply, lambda choice: choice.text)}


def refusal(call):
    try:
        call()
    except openai.APIStatusError as error:
        return {
            "class": type(error).__name__,
            "status": error.status_code,
            "param": error.param,
            "code": error.code,
            "message": error.message,
        }
    return None


complete = client.completions.create
got["refusals"] = {
    "model": refusal(lambda: complete(model="other", prompt=prompt)),
    "n": refusal(lambda: complete(model=model, prompt=prompt, n=2)),
    "mode": refusal(lambda: complete(model=model, prompt=prompt, **mode("medium"))),
    "temperature": refusal(lambda: complete(model=model, prompt=prompt, temperature=-1)),
    "context": refusal(lambda: complete(model=model, prompt=[1] * (context + 5))),
    "messages": refusal(lambda: client.chat.completions.create(model=model, messages=[])),
    "stream": refusal(lambda: complete(model=model, prompt=prompt, n=3, stream=True)),
}

# Two streams at once: each must have spoken before the other is over.
first_pieces = threading.Barrier(2, timeout=60)
concurrent = [None, None]


def follow(index, name):
    # To the end of the context: long enough that both are still running when both have begun.
    asked = {**greedy(prompt=prompt, stream=True), "max_tokens": context}
    stream = iter(client.completions.create(**asked, **mode(name)))
    pieces = [next(stream).choices[0].text]
    first_pieces.wait()
    pieces += [choice.text for chunk in stream for choice in chunk.choices]
    concurrent[index] = "".join(pieces)


threads = [threading.Thread(target=follow, args=pair) for pair in enumerate(["exact", "little"])]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
got["concurrent"] = concurrent

print(json.dumps(got))
