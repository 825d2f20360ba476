"""The page about an audit, in a real browser, and what is drawn on it."""

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from scipy.integrate import trapezoid
from scipy.stats import norm
from tests.browser import browser

from dptorch import make_plan
from dptorch.audit import Evidence, audit, judge
from dptorch.audit.audit_page import allowed_curve, posterior, render_audit, risks, write_report
from dptorch.audit.result import AuditResult
from dptorch.audit.roc import (
    auc,
    auc_interval,
    pointwise_band,
    roc_curve,
    tpr_at_fpr,
    uniform_band,
)

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

GAUSSIAN = Evidence.of(
    np.random.default_rng(0).normal(1, 1, 400), np.random.default_rng(1).normal(0, 1, 400)
)


@pytest.fixture(scope="module")
def result() -> AuditResult:
    plan = make_plan(
        sample_rate=1.0, sample_size=100, steps=4, noise_multiplier=2.0, target_delta=1e-5
    )
    return audit(plan, canaries=400, seed=2, statement="The statement <of> the run.")


@pytest.mark.slow
@pytest.mark.browser
def test_a_browser_shows_the_page(result: AuditResult, tmp_path: Path) -> None:
    chromium = browser()
    page = write_report(result, tmp_path / "audit.html")
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile",
        "--virtual-time-budget=5000", "--window-size=1100,2600",
    ]  # fmt: skip
    # What the browser made of it: a script in a copy reports every image that was drawn.
    script = (
        "<script>addEventListener('load', () => { document.title = 'drawn ' + [...document.images]"
        ".map(i => i.naturalWidth > 100 && i.getBoundingClientRect().width > 100).join() + ' wide ' +"
        " (document.documentElement.scrollWidth <= innerWidth) })</script></body>"
    )
    copy = tmp_path / "copy.html"
    copy.write_text(page.read_text().replace("</body>", script))
    dom = subprocess.run(
        [*command, "--dump-dom", copy.as_uri()],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "<title>drawn true,true,true wide true</title>" in dom
    assert result.verdict in dom
    picture = tmp_path / "page.png"
    subprocess.run(
        [*command, f"--screenshot={picture}", page.as_uri()],
        capture_output=True,
        check=True,
    )
    assert picture.stat().st_size > 50_000


@pytest.mark.slow
def test_the_page_says_what_was_found_and_loads_nothing(result: AuditResult) -> None:
    text = render_audit(result)
    for needed in (
        result.verdict,
        f"{result.epsilon_lower:.3f}",
        "The statement &lt;of&gt; the run.",
        "noise of single steps",
        "at most, if the claim is true",
        "with chance on its side",
        "Belief before",
    ):
        assert needed in text
    assert "verified" not in text.lower()
    addresses = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(addresses) == 3
    assert all(a.startswith("data:image/svg+xml;base64,") for a in addresses)
    assert not re.search(r"@import|url\(|<script|<link|<iframe", text)


@pytest.mark.slow
def test_a_refuted_claim_and_one_without_limit_are_pages_too() -> None:
    perfect = Evidence.of(np.arange(50) + 100.0, np.arange(50.0))
    refuted = judge(perfect, epsilon=0.1, delta=0.0, adversary="sees all")
    assert "so the claim is false" in render_audit(refuted)
    endless = judge(perfect, epsilon=float("inf"), delta=1e-5, adversary="sees all")
    assert allowed_curve(endless) is None
    assert "no limit" in render_audit(endless)
    constant = judge(
        Evidence.of(np.zeros(30), np.zeros(30)), epsilon=1.0, delta=0, adversary="blind"
    )
    assert "NOT REFUTED" in render_audit(constant)


def test_the_drawn_limit_is_the_gaussian_trade_off(result: AuditResult) -> None:
    # Four steps at multiplier 2 without sampling: μ = 1.
    fpr = np.array([0.001, 0.01, 0.1, 0.5])
    curve = allowed_curve(result, fpr)
    assert curve is not None
    assert curve[1] == pytest.approx(norm.cdf(norm.ppf(fpr) + 1), rel=0.01)


@pytest.mark.slow
def test_the_example_of_the_documentation_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs/audit.md").read_text()
    exec(compile(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], "audit.md", "exec"), {})
    assert "REFUTED at confidence 95 %" in capsys.readouterr().out
    assert (tmp_path / "audit.html").exists()


def test_posterior_is_bayes(result: AuditResult) -> None:
    assert posterior(0.1, 0.5, 0.01) == pytest.approx(0.05 / (0.05 + 0.009))
    assert posterior(0.3, 0.0, 0.0) == 0.3
    for risk in risks(result):
        most = norm.cdf(norm.ppf(0.01) + 1)
        assert risk.allowed == pytest.approx(posterior(risk.prior, most, 0.01), rel=0.01)


def test_roc_numbers_against_counting() -> None:
    inside, outside = GAUSSIAN.members, GAUSSIAN.others
    pairs = (inside[:, None] > outside).mean()
    assert auc(GAUSSIAN) == pytest.approx(pairs)
    assert tpr_at_fpr(GAUSSIAN, 0.01) == pytest.approx(np.mean(inside > np.sort(outside)[-5]))
    assert tpr_at_fpr(GAUSSIAN, 0.0) == pytest.approx(np.mean(inside > outside.max()))
    fpr, tpr = roc_curve(GAUSSIAN)
    assert trapezoid(tpr, fpr) == pytest.approx(pairs)


@pytest.mark.slow
def test_bands_and_intervals_cover() -> None:
    # 300 measurements of a known curve. The uniform band misses at most 5 %, and so does the
    # pointwise one at one threshold; five standard errors of that are 6.3 points.
    rng = np.random.default_rng(0)
    grid = np.geomspace(0.005, 0.99, 40)
    true = norm.cdf(norm.ppf(grid) + 1)
    area = norm.cdf(1 / np.sqrt(2))
    missed = {"uniform": 0, "pointwise": 0, "auc": 0}
    for _ in range(300):
        scores = Evidence.of(rng.normal(1, 1, 150), rng.normal(0, 1, 150))
        low, high = uniform_band(scores, grid)
        missed["uniform"] += bool(((true < low) | (true > high)).any())
        low, high = pointwise_band(scores, grid[20:21])
        missed["pointwise"] += bool(not low[0] <= true[20] <= high[0])
        low_auc, high_auc = auc_interval(scores)
        missed["auc"] += not low_auc <= area <= high_auc
    assert missed["uniform"] / 300 < 0.113
    assert missed["pointwise"] / 300 < 0.113
    assert 0.0 < missed["auc"] / 300 < 0.113
    # Half of the width is caught.
    narrow = 0
    for _ in range(100):
        scores = Evidence.of(rng.normal(1, 1, 150), rng.normal(0, 1, 150))
        low_auc, high_auc = auc_interval(scores, significance=0.33)
        narrow += not low_auc <= area <= high_auc
    assert narrow / 100 > 0.15
