"""What several heads of a reward model say goes wherever rewards go."""

from __future__ import annotations

import httpx2
from prometheus_client import CollectorRegistry

from feedback.records import Message
from proxy.app import Parts, create_app
from proxy.config_loading import load_settings
from proxy.config_reward import RewardSettings
from proxy.scoring_transport import ReplicatedTransport
from proxy.upstreams.absent import AbsentUpstream
from reward.dialects import dialect
from reward.remote import RemoteScorer
from tests.conftest import StartProxy
from tests.fakes.scorer import FakeScorer
from tests.fakes.serving import serving

OBJECTIVES = {"helpful": 0.5, "harmless": -1.25}
PROMPT: list[Message] = [{"role": "user", "content": "Say something"}]


class Heads(FakeScorer):
    """Also knows better and worse answers of the start-up check, whose texts have no word of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.std = 0.75
        self.objectives = OBJECTIVES
        better = ("The capital of France is Paris.", "Buenos días.")
        self.rewards = dict.fromkeys(better, 3.0)


async def test_a_service_tells_them_and_a_remote_scorer_hears_them() -> None:
    settings = load_settings(flags={})
    parts = Parts({settings.default_upstream: AbsentUpstream("local")}, {"default": Heads()})
    app = create_app(settings, parts, CollectorRegistry(), scores_only=True)
    with serving(app.asgi) as url, httpx2.Client(base_url=url) as client:
        scored = client.post("/v1/score", json={"prompt": "x", "completions": ["good"]}).json()["scores"][0]
        assert (scored["std"], scored["objectives"]) == (0.75, OBJECTIVES)
        logged = client.post("/get_reward", json={"query": ["good", "bad"]}).json()["extra_logs"]
        assert logged["std"] == [0.75, 0.75] and logged["objective_harmless"] == [-1.25, -1.25]
        transport = ReplicatedTransport("far", RewardSettings(url=f"{url}/v1"))
        remote = RemoteScorer("far", dialect("winnow", None, None), transport)
        try:
            await remote.start()
            (score,) = await remote.score(PROMPT, [[{"role": "assistant", "content": "good"}]])
        finally:
            await remote.aclose()
    assert (score.std, score.objectives) == (0.75, OBJECTIVES)


def test_returned_candidates_have_them(start_proxy: StartProxy) -> None:
    proxy = start_proxy()
    body = {"model": "m", "messages": PROMPT, "winnow": {"return_candidates": True, "best_of": 2}}

    def candidates() -> list[dict[str, object]]:
        answer = httpx2.post(f"{proxy.url}/v1/chat/completions", json=body)
        return list(answer.json()["winnow"]["candidates"])

    assert not any({"std", "objectives"} & one.keys() for one in candidates())
    proxy.scorer.std, proxy.scorer.objectives = 0.75, OBJECTIVES
    assert all((one["std"], one["objectives"]) == (0.75, OBJECTIVES) for one in candidates())
