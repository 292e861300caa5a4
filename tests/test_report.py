"""The report as people see it: opened in a real browser, where there is one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Finished
from playwright.sync_api import Browser, Page, sync_playwright

from mnist_wandb.compare import compare_runs
from mnist_wandb.records import find_runs, read_records
from mnist_wandb.report import build_report
from mnist_wandb.runs import RunFolder, list_runs

Cli = Callable[..., Finished]
Open = Callable[..., Page]
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
HOSTILE = '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=1">"\'&amp;'
NUM_RUNS = 7


def make_report(folder: Path, data_dir: Path = Path("nowhere")) -> str:
    records, damaged = read_records(find_runs([str(folder)], folder))
    return build_report(compare_runs(records, left_out=damaged), data_dir=data_dir)


@pytest.fixture(scope="module")
def page_file(example_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(make_report(example_runs))
    return file


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium: `apt-get install chromium`")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, page_file: Path) -> Iterator[Open]:
    """Open a report; at the test's end it must have asked for nothing and complained of nothing."""
    seen: list[str] = []
    contexts = []

    def call(
        file: Path = page_file, *, scheme: str = "light", width: int = 1280, height: int = 900
    ) -> Page:
        context = browser.new_context(
            color_scheme=scheme,  # type: ignore[arg-type]
            viewport={"width": width, "height": height},
            reduced_motion="reduce",
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: seen.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: seen.append(f"error: {error}"))
        page.on("dialog", lambda dialog: seen.append(f"dialog: {dialog.message}"))
        page.on(
            "request",
            lambda request: (
                seen.append(request.url)
                if request.url != file.as_uri() and not request.url.startswith("data:")
                else None
            ),
        )
        page.goto(file.as_uri())
        page.wait_for_selector("body[data-ready]")
        return page

    yield call
    for context in contexts:
        context.close()
    assert seen == []


def count(page: Page, selector: str) -> int:
    return page.locator(selector).count()


def curves(page: Page) -> int:
    return count(page, "#curve-chart .mark-line path")


# ── in the browser ───────────────────────────────────────────────────────────────────────────


def test_all_charts_have_drawn(open_page: Open) -> None:
    page = open_page()
    names = page.eval_on_selector_all("[data-chart]", "all => all.map(e => e.dataset.chart)")
    assert names == [
        "leaderboard", "classes", "calibration", "importance", "parallel", "parameters", "seconds"
    ]  # fmt: skip
    for name in names:
        chart = page.locator(f"[data-chart={name}] svg")
        box = chart.bounding_box()
        assert box is not None
        assert box["width"] > 300, name
        assert box["height"] > 60, name
        assert chart.locator(".role-mark path, .role-mark line").count() >= 2, name
    assert count(page, "[data-chart=parallel] .mark-line path") == NUM_RUNS


def test_runs_are_switched_on_and_off_and_other_metrics_chosen(open_page: Open) -> None:
    page = open_page()
    assert curves(page) == NUM_RUNS
    page.locator("#curve-runs input").first.uncheck()
    page.wait_for_function("document.querySelectorAll('#curve-chart .mark-line path').length == 6")
    page.get_by_role("button", name="None").click()
    page.wait_for_function("!document.querySelector('#curve-chart .mark-line path[d^=M]')")
    page.get_by_role("button", name="Best of each group").click()
    page.wait_for_function("document.querySelectorAll('#curve-chart .mark-line path').length == 5")
    before = page.inner_html("#curve-chart")
    page.select_option("#curve-metric", "train/loss")
    page.wait_for_function(
        "before => document.getElementById('curve-chart').innerHTML != before", arg=before
    )
    assert curves(page) == 5


def test_the_pointer_shows_the_values_of_a_curve(open_page: Open) -> None:
    page = open_page()
    chart = page.locator("#curve-chart svg")
    for x in (400, 450):
        chart.hover(position={"x": x, "y": 100}, force=True)
    tooltip = page.wait_for_selector("#vg-tooltip-element.visible")
    assert tooltip is not None
    assert re.search(r"run\s+[A-E] · .*seed \d\s+epoch\s+[\d.]+\s+value", tooltip.inner_text())


def cards(page: Page) -> list[str]:
    return page.locator("#cards li").evaluate_all("all => all.map(e => e.title)")


def test_pictures_are_real_and_filtered_by_class(open_page: Open) -> None:
    page = open_page()
    assert len(cards(page)) == 36
    page.get_by_role("button", name="Show all").click()
    everything = cards(page)
    assert len(everything) >= 48
    assert page.locator("#picture-more").is_hidden()
    assert page.locator("#cards img").first.evaluate("e => [e.naturalWidth, e.naturalHeight]") == [
        28, 28
    ]  # fmt: skip
    truth = everything[0].split()[2].rstrip(",")
    page.select_option("#picture-truth", label=truth)
    chosen = [title for title in everything if f": {truth}, predicted" in title]
    assert cards(page) == chosen
    predicted = chosen[0].split()[-1]
    assert len(chosen) < 36
    page.select_option("#picture-predicted", label=predicted)
    both = [title for title in chosen if title.endswith(f"predicted {predicted}")]
    assert cards(page) == both
    assert page.inner_text("#picture-count").startswith(f"{len(both)} image")


def test_other_galleries_and_other_runs(open_page: Open) -> None:
    page = open_page()
    page.get_by_text("Sample predictions").click()
    first = page.inner_html("#cards")
    assert len(cards(page)) == 32
    page.select_option("#picture-run", index=1)
    assert page.inner_html("#cards") != first
    page.get_by_text("A right, B wrong").click()
    assert "is " in page.locator("#cards li p").first.inner_text()
    assert page.locator("#picture-run-label").is_hidden()


def test_a_cell_of_the_confusion_matrix_shows_its_pictures(open_page: Open) -> None:
    page = open_page()
    cell = page.locator(".matrix").nth(1).locator("button").first
    label = str(cell.get_attribute("aria-label"))
    found = re.fullmatch(r"(\d+): (\d) taken for (\d); show", label)
    assert found is not None
    cell.click()
    assert page.input_value("#picture-run") == "1"
    assert all(t.endswith(f": {found[2]}, predicted {found[3]}") for t in cards(page))
    assert 0 < len(cards(page)) <= int(found[1])
    page.locator(".confusion-run").first.select_option(index=3)
    assert page.locator(".matrix").first.locator("tbody tr").count() == 10


def focused(page: Page) -> str:
    return str(page.evaluate("document.activeElement.textContent.trim().slice(0, 40)"))


def test_the_page_works_with_a_keyboard_alone(open_page: Open) -> None:
    page = open_page()
    page.keyboard.press("Tab")
    assert focused(page) == "Skip to the results"
    page.keyboard.press("Enter")
    assert page.url.endswith("#leaderboard")
    box = page.locator("#curve-runs input").first
    box.focus()
    page.keyboard.press("Space")
    page.wait_for_function("document.querySelectorAll('#curve-chart .mark-line path').length == 6")
    page.locator("input[name=kind]").first.focus()
    page.keyboard.press("ArrowRight")
    assert len(cards(page)) == 32
    page.locator(".matrix button").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("input[name=kind][value=mistakes]").is_checked()
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"
    # Everything that can be clicked can be reached: controls are real controls.
    assert page.locator("[onclick], [tabindex='-1']").count() == 0


def contrast(page: Page) -> float:
    """Contrast of text on panels, after WCAG 2.2, and a check that charts use the same colours."""
    return float(
        page.evaluate("""() => {
        const light = (text) => {
            const [r, g, b] = text.match(/[\\d.]+/g).map(Number)
                .map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const label = document.querySelector("[data-chart=leaderboard] .role-axis-label text");
        const panel = getComputedStyle(document.querySelector("section")).backgroundColor;
        const [a, b] = [light(getComputedStyle(label).fill), light(panel)].sort((x, y) => x - y);
        return (b + 0.05) / (a + 0.05);
    }""")
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_charts_can_be_read_in_light_and_dark(open_page: Open, scheme: str) -> None:
    page = open_page(scheme=scheme)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) > 384) == (scheme == "light")
    assert contrast(page) > 7


@pytest.mark.parametrize("width", [320, 390, 768])
def test_nothing_overflows_on_a_small_screen(open_page: Open, width: int) -> None:
    page = open_page(width=width, height=800)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_page_can_be_printed_in_light_with_everything_open(open_page: Open) -> None:
    page = open_page(scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("nav").is_hidden()
    assert contrast(page) > 7
    assert len(page.pdf(format="A4")) > 50_000
    assert page.locator("details:not([open])").count() == 0


def test_the_browser_refuses_any_request(open_page: Open) -> None:
    page = open_page()
    policy = page.get_attribute("meta[http-equiv=Content-Security-Policy]", "content")
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")
    source = page.content()
    assert not re.search(r"""(?:src|href)=["'](?!#|data:)""", source.partition("<script")[0])


def test_hostile_names_are_text(open_page: Open, runs_dir: Path, tmp_path: Path) -> None:
    for run in list_runs(runs_dir):
        config = run.read_config()
        tracking = config.tracking.model_copy(
            update={"notes": HOSTILE, "tags": (HOSTILE[:60],), "group": None}
        )
        name = HOSTILE[:100]
        run.write_config(config.model_copy(update={"name": name, "tracking": tracking}), "x")
    first, *_ = list_runs(runs_dir)
    summary = json.loads(first.summary_path.read_text())
    first.summary_path.write_text(json.dumps({**summary, "status": "failed", "error": HOSTILE}))
    rename_classes(runs_dir)
    file = tmp_path / "hostile.html"
    file.write_text(make_report(runs_dir))
    page = open_page(file)
    page.locator("header details summary").click()
    assert HOSTILE in page.locator("header details").inner_text()
    page.locator("#environment details summary").click()
    assert HOSTILE in page.locator("#environment details").inner_text()
    assert "<b>0</b>" in page.locator(".matrix").first.inner_text()
    for row in page.locator("[data-chart=classes] .mark-symbol path").all()[:2]:
        row.hover(force=True)
    assert page.evaluate("window.hacked") is None
    assert count(page, "img[src=x], .matrix b") == 0


def rename_classes(folder: Path) -> None:
    for run in list_runs(folder):
        header, rest = run.confusion_path.read_text().split("\n", 1)
        names = [f"<b>{name}</b>" for name in header.split(",")[1:]]
        run.confusion_path.write_text(",".join(["t", *names]) + "\n" + rest)


def test_without_the_data_the_page_says_so(open_page: Open, runs_dir: Path, tmp_path: Path) -> None:
    for run in list_runs(runs_dir):
        config = run.read_config()
        data = config.data.model_copy(update={"dataset": "kmnist"})
        run.write_config(config.model_copy(update={"data": data}), "x")
    file = tmp_path / "blank.html"
    file.write_text(make_report(runs_dir))
    page = open_page(file)
    reason = "Pictures are left out: kmnist is not in nowhere; nothing is downloaded for this"
    assert page.get_by_text(reason).count() == 1
    assert count(page, "#cards li") == 36
    assert count(page, "#cards img") == 0


# ── without a browser ────────────────────────────────────────────────────────────────────────


def test_the_page_is_one_file_of_a_moderate_size(page_file: Path) -> None:
    page = page_file.read_text()
    assert len(page.encode()) < 2.5 * 2**20  # twelve runs may have five megabytes
    assert page.count("<script") == 3 == page.count("</script>")
    assert "http://" not in page.partition("<script")[0]


def test_one_run_alone_makes_a_page(example_runs: Path) -> None:
    first = RunFolder(list_runs(example_runs)[0].path)
    page = make_report(first.path)
    assert "1 finished run in 1 group," in page
    assert "Parameters</h2>" not in page


def test_damaged_predictions_are_named_and_the_rest_is_shown(runs_dir: Path) -> None:
    first, *_ = list_runs(runs_dir)
    first.predictions_path.write_bytes(b"nonsense")
    page = make_report(runs_dir)
    assert f"{first.predictions_path}: cannot be read" in page
    for run in list_runs(runs_dir):
        run.predictions_path.unlink(missing_ok=True)
    page = make_report(runs_dir)
    assert "What the models see" not in page
    assert "Leaderboard" in page


def test_report_writes_the_page_and_says_where(cli: Cli, runs_dir: Path) -> None:
    list_runs(runs_dir)[0].summary_path.unlink()
    done = cli("report", "runs", "-o", "page.html")
    assert done.code == 0
    assert re.search(r"^report      page.html \(1\.\d MiB\)$", done.out, flags=re.M)
    assert "left out: digits-linear (example0): unfinished" in done.err
    assert Path("page.html").read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in Path().iterdir()) == ["page.html", "runs"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "page.pdf"), "error: --output page.pdf: expected a file that ends in .html"),
        (("-o", "no/page.html"), "error: --output no/page.html: there is no folder no"),
        (("-o", "folder.html"), "error: folder.html: cannot be written: Is a directory"),
        (("--metric", "test/loss"), "error: --metric test/loss: test scores are shown and never"),
        (("nowhere",), "error: nowhere: no run folder of that path, name or id in runs"),
    ],
)
def test_report_refuses_bad_input_and_leaves_nothing(
    cli: Cli, runs_dir: Path, arguments: tuple[str, ...], message: str
) -> None:
    Path("folder.html").mkdir()
    done = cli("report", *arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert sorted(path.name for path in Path().iterdir()) == ["folder.html", "runs"]
