"""`safevlm serve`: the verdict accompanies the answer, in OpenAI's protocol, tested with OpenAI's client."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from http_client import GENERATED, error_of, post
from tiny import BENIGN, RISKY, encode, judging_model

from safevlm.trainer.cli import main

pytestmark = pytest.mark.slow
ENDLESS = {"2": -100}  # bans the end token


@pytest.fixture(scope="module")
def verdict(judge, processor):
    """`verdict(question)`: what `assess` says about the picture and the question."""
    return lambda question, **kwargs: judge.model.assess(**encode(processor, [question], [1]), **kwargs).to_list()[0]


def same(found: dict, expected: dict) -> bool:
    """Whether two verdicts are equal, up to rounding of the probabilities."""
    return set(found) == set(expected) and all(found[name] == pytest.approx(expected[name]) for name in expected)


def test_a_risky_request_gets_refusal_and_verdict(ask, chat, judge, verdict):
    reply = ask(chat(RISKY), max_tokens=None)
    assert reply.choices[0].message.content.strip() == judge.refusal
    assert same(reply.safety, verdict(RISKY)) and reply.safety["action"] == "refuse"
    assert (reply.safety["category"], reply.safety["level"]) == ("politics", "high")


def test_a_benign_request_gets_the_models_answer_and_verdict(ask, chat, judge, verdict):
    reply = ask(chat(BENIGN))
    assert reply.choices[0].message.content == judge.answer(BENIGN).lstrip() != judge.refusal
    assert same(reply.safety, verdict(BENIGN)) and reply.safety["action"] == "allow"


@pytest.mark.parametrize("question", [RISKY, BENIGN])
def test_a_stream_has_the_verdict_with_the_first_words_and_at_the_end(ask, chat, judge, verdict, question):
    chunks = list(ask(chat(question), stream=True, max_tokens=64 if question == RISKY else 12))
    words = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(words).strip() == (judge.refusal if question == RISKY else judge.answer(question).strip())
    spoken = next(i for i, word in enumerate(words) if word)
    found = [getattr(chunk, "safety", None) for chunk in chunks]
    assert any(found[: spoken + 1]) and chunks[-1].choices[0].finish_reason
    assert len([safety for safety in found if safety]) == 2  # not in every chunk
    assert same(found[-1], verdict(question))


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_without_an_image_is_not_assessed(ask, chat, stream):
    reply = ask(chat(RISKY, image=None), stream=stream)
    safety = list(reply)[-1].safety if stream else reply.safety
    assert (safety["assessed"], safety["action"], safety["category"]) == (False, "allow", None)


def test_requests_at_the_same_time_keep_their_own_verdicts(ask, chat, verdict):
    def last(question):
        *_, chunk = ask(chat(question), stream=True)
        return chunk.safety

    questions = [RISKY, BENIGN] * 4
    with ThreadPoolExecutor(len(questions)) as pool:
        whole = pool.map(lambda question: ask(chat(question)).safety, questions)
        streams = pool.map(last, questions)
        for question, *found in zip(questions, whole, streams, strict=True):
            assert [one["action"] for one in found] == [verdict(question)["action"]] * 2


def test_the_chats_before_belong_to_the_question(ask, chat):
    later = [{"role": "assistant", "content": "An answer."}, {"role": "user", "content": "Go on."}]
    assert ask([*chat(RISKY), *later]).safety["assessed"]


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 2.0, "top_p": 0.5, "seed": 1, "frequency_penalty": -2.0, "presence_penalty": 2},
        {"user": "off", "metadata": {"safety_policy": "off"}},
    ],
    ids=["sampling", "ignored"],
)
def test_no_field_of_a_request_changes_the_policy(ask, chat, judge, fields):
    reply = ask(chat(RISKY), max_tokens=None, **fields)
    assert reply.choices[0].message.content.strip() == judge.refusal
    assert reply.safety["action"] == "refuse"


def test_a_bias_on_the_refusals_tokens_does_not_change_it(ask, chat, judge):
    ids = judge.model.config.policy_token_ids[judge.refusal].split()
    reply = ask(chat(RISKY), max_tokens=None, logit_bias=dict.fromkeys(ids, -100))
    assert reply.choices[0].message.content.strip() == judge.refusal


@pytest.mark.parametrize("stream", [False, True])
def test_stop_ends_an_answer_before_the_stop(ask, chat, judge, stream):
    whole = ask(chat(BENIGN), logit_bias=ENDLESS).choices[0].message.content
    stop = whole[2:4]
    reply = ask(chat(BENIGN), stop=["not there", stop], stream=stream, logit_bias=ENDLESS)
    if stream:
        chunks = list(reply)
        text, reason = "".join(c.choices[0].delta.content or "" for c in chunks), chunks[-1].choices[0].finish_reason
    else:
        text, reason = reply.choices[0].message.content, reply.choices[0].finish_reason
    assert (text, reason) == (whole[: whole.index(stop)], "stop")


def test_roles_and_empty_fields_that_clients_send_back_work(ask, chat):
    first = ask(chat(BENIGN))
    history = [{"role": "developer", "content": "Be brief."}, *chat(BENIGN), first.choices[0].message.model_dump()]
    reply = ask([*history, {"role": "user", "content": "Go on.", "name": "me"}], stop=[], n=1, logprobs=False)
    assert reply.safety["assessed"] and reply.usage.completion_tokens > 0


def test_a_seed_makes_an_answer_again(ask, chat):
    once, again, other = (
        ask(chat(BENIGN), temperature=1.0, seed=seed).choices[0].message.content for seed in (3, 3, 4)
    )
    assert once == again != other


def test_penalties_and_biases_are_openais(ask, chat, judge, processor):
    token = processor.tokenizer.convert_tokens_to_ids("a")
    assert ask(chat(BENIGN), logit_bias={str(token): 100}, max_tokens=4).choices[0].message.content == "aaaa"
    liked = {"logit_bias": {str(token): 100}, "frequency_penalty": 2}
    assert ask(chat(BENIGN), **liked).choices[0].message.content.count("a") == 12  # 12 x 2 is less than 100


def test_usage_counts_tokens_and_ends_a_stream_that_asks_for_it(ask, chat):
    usage = ask(chat(BENIGN), logit_bias=ENDLESS).usage
    assert usage.completion_tokens == 12 and usage.total_tokens == usage.prompt_tokens + 12
    *others, last = ask(chat(BENIGN), stream=True, stream_options={"include_usage": True}, logit_bias=ENDLESS)
    assert last.choices == [] and last.usage == usage and {chunk.usage for chunk in others} == {None}


def test_the_answer_has_what_the_model_has_left(ask, chat, judge):
    reply = ask(chat(BENIGN), max_tokens=10**9, logit_bias=ENDLESS)
    hint = max(len(ids.split()) for ids in judge.model.config.policy_token_ids.values())
    assert reply.usage.total_tokens == judge.model.config.get_text_config().max_position_embeddings - hint
    assert reply.choices[0].finish_reason == "length"


def test_a_stream_ends_with_done(server, chat):
    body = json.dumps({"messages": chat(BENIGN), "stream": True, **GENERATED}).encode()
    status, text = post(server, body=body)
    assert status == 200 and text.endswith("\n\ndata: [DONE]\n\n")


def test_it_serves_one_model_and_names_it(client, refused, ask, chat, judge):
    assert [model.id for model in client.models.list()] == [str(judge.folder)]
    assert client.models.retrieve(str(judge.folder)).id == str(judge.folder)
    status, error = refused(chat(RISKY), model="some/unsafe-base")
    assert (status, error.param, error.code) == (404, "model", "model_not_found")


@pytest.mark.parametrize("name", ["demo/model", "./demo/model", "demo//model/", "demo/model@main"])
@pytest.mark.parametrize("served", ["demo/model", "./demo/model", "demo/model@main"])
def test_a_folder_has_one_name_however_it_is_written(name, served):
    from safevlm.trainer.serving.errors import RequestError
    from safevlm.trainer.serving.routes import check_model

    if "@" in name and "@" not in served:
        with pytest.raises(RequestError):
            check_model(name, served)
    else:
        check_model(name, served)


@pytest.mark.parametrize(
    "path", ["/v1/systemone", "/load_model", "/reset", "/v1/completions", "/v1/responses", "/docs", "/openapi.json"]
)
def test_there_is_no_other_endpoint(server, path):
    for method in ("POST", "GET"):
        status, text = post(server, path, b"{}", method)
        assert status == 404 and error_of(text).type == "invalid_request_error"


@pytest.fixture(scope="module")
def unsure(judge, processor, model, tmp_path_factory):
    """A model that gives `RISKY` a risk score of 0.35: `default` allows that, `strict` refuses it."""
    safe, folder = judging_model(model, processor), tmp_path_factory.mktemp("unsure") / "model"
    none = safe.assess(**encode(processor, [RISKY], [1])).level_probabilities[0, 0].double().item()
    with torch.no_grad():
        safe.safety.head.level_classifier.bias[0] += math.log((1 - none) / none) - math.log(0.35 / 0.65)
    safe.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def here(monkeypatch):
    """`here("MODEL", ...)`: a client of `safevlm serve MODEL ...` in this process."""
    from starlette.testclient import TestClient

    def client(*arguments):
        apps = []
        monkeypatch.setattr("uvicorn.Server.run", lambda server: apps.append(server.config.app))
        assert main(["serve", "--device", "cpu", *map(str, arguments)]) == 0
        return TestClient(apps[0], raise_server_exceptions=False)

    return client


@pytest.mark.parametrize("policy, action", [(None, "allow"), ("strict", "refuse"), ("off", "off"), ("file", "warn")])
def test_the_operators_policy_is_in_force(unsure, here, chat, tmp_path, policy, action):
    (tmp_path / "policy.yaml").write_text(
        "{name: mild, risk_threshold: 0.2, level_actions: {low: caution, high: warn}}"
    )
    options = [] if policy is None else ["--policy", tmp_path / "policy.yaml" if policy == "file" else policy]
    reply = here(unsure, *options).post("/v1/chat/completions", json={"messages": chat(RISKY), **GENERATED}).json()
    assert "error" not in reply and reply["safety"]["action"] == action


@pytest.mark.parametrize("stream", [False, True])
def test_the_vision_tower_runs_once(judge, here, chat, monkeypatch, stream):
    from transformers import CLIPVisionModel

    runs, forward = [], CLIPVisionModel.forward
    monkeypatch.setattr(CLIPVisionModel, "forward", lambda *args, **kwargs: runs.append(1) or forward(*args, **kwargs))
    body = {"messages": chat(BENIGN), "stream": stream, **GENERATED}
    assert here(judge.folder).post("/v1/chat/completions", json=body).status_code == 200
    assert len(runs) == 1


def test_what_goes_wrong_inside_tells_nothing(judge, here, chat, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise RuntimeError("/home/secret broke")

    client = here(judge.folder)
    monkeypatch.setattr("safevlm.SafeVlmForConditionalGeneration.generate", fail)
    body = {"messages": chat(BENIGN), **GENERATED}
    reply = client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 500 and error_of(reply.text).code == "internal_error"
    assert "secret" not in reply.text
    assert client.post("/v1/chat/completions", json={**body, "stream": True}).status_code == 500
    assert "/home/secret broke" in caplog.text  # for the operator


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_in_mid_stream_is_its_last_event(judge, here, chat, monkeypatch, stream):
    """By then the verdict, the first words and thus the status have been sent."""
    from safevlm.trainer.serving.decoding import AnswerStreamer

    def fail(self, last=False):
        if len(self.ids) > 3:
            raise RuntimeError("/home/secret broke")
        self.send("word")

    client = here(judge.folder)
    monkeypatch.setattr(AnswerStreamer, "send_text", fail)
    reply = client.post(
        "/v1/chat/completions", json={"messages": chat(BENIGN), "stream": stream, "logit_bias": ENDLESS}
    )
    assert "secret" not in reply.text
    if not stream:
        assert reply.status_code == 500 and error_of(reply.text).code == "internal_error"
        return
    *events, error, done, rest = reply.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "") and "word" in events[1] and '"action": "allow"' in events[0]
    assert error_of(error.removeprefix("data: ")).type == "server_error"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{base}"], "MODEL '{base}' is of type 'llava', not a SafeVLM"),
        (["{judge}", "--policy", "nope"], "got 'nope'"),
        (["{judge}", "--dtype", "floaty"], "'floaty'"),
        (["{judge}", "--device", "gpu"], "gpu"),
        (["{judge}", "--request-timeout", "0"], "--request-timeout must be a number above 0"),
        (["{judge}", "--port", "99999"], "--port must be a number from 0 to 65535, got 99999"),
    ],
    ids=["base", "policy", "dtype", "device", "timeout", "port"],
)
def test_bad_options_are_one_line(judge, base, tmp_path, capsys, arguments, message):
    base.save_pretrained(tmp_path)
    names = {"base": tmp_path, "judge": judge.folder}
    assert main(["serve", *(argument.format(**names) for argument in arguments)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("safevlm serve: ") and message.format(**names) in last


def test_missing_packages_are_named(judge, monkeypatch, capsys):
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    assert main(["serve", str(judge.folder)]) == 1
    assert "pip install 'safevlm[serve]'" in capsys.readouterr().err
