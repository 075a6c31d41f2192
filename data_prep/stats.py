"""What a dataset holds, in numbers: a table on the terminal, and a self-contained page.

    python -m data_prep.stats DATASET --out stats.html --samples 1000

Clips, hours, failures, sizes on disk, lengths of captions, and what the latents are like: mean and standard deviation
per channel beside the 0 and 1 that the codec's normalisation aims at, the largest values, the clips with the smallest
and the largest change over time. All samples are read once, one after another; or `--samples` of them, evenly spread.
Memory does not grow with what is read, but for 20 bytes per sample.
"""

import argparse
import html
import json
import math
import os
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_prep.card import CARD, check_sample, read_card
from data_prep.command import printable, run_command
from data_prep.files import write_atomic
from data_prep.index import SampleIndex
from data_prep.pages import COLOURS, GREY, html_page, html_table, new_figure, svg
from data_prep.places import local_folder
from data_prep.shards import Sample, SampleError, caption_of, read_sample, span_of
from data_prep.stream import stream_samples
from data_prep.work import FAILURES

MEAN_LIMIT = 0.5  # a channel is marked when its mean is farther from 0,
STD_LIMITS = 0.5, 2.0  # or its standard deviation outside of these
NAMED = 8  # clips that a table names
HALVES = 1 << 15  # values that |float16| can have
MAGNITUDES = np.arange(HALVES, dtype=np.uint16).view(np.float16).astype(np.float64)  # in ascending order; inf, nan last

STYLE = """
th, td { text-align: left; } td { overflow-wrap: anywhere; } td:first-child { white-space: nowrap; }
.numbers th, .numbers td { text-align: right; }
"""


class Moments:
    """Mean and standard deviation per channel of all values given so far, without keeping them.

    Chan, Golub and LeVeque (1983): means and sums of squared deviations are merged, in float64.
    """

    def __init__(self, channels: int):
        self.count = 0
        self.mean = np.zeros(channels)
        self._squares = np.zeros(channels)  # of the deviations from the mean

    def add(self, values: np.ndarray) -> None:
        """Takes in `values` [C, N]."""
        values = values.astype(np.float64)
        mean = values.mean(axis=1)
        squares = np.square(values - mean[:, None]).sum(axis=1)
        count = self.count + values.shape[1]
        shift = mean - self.mean
        self._squares += squares + shift**2 * (self.count * values.shape[1] / count)
        self.mean += shift * (values.shape[1] / count)
        self.count = count

    @property
    def std(self) -> np.ndarray:
        """[C]"""
        return np.sqrt(self._squares / max(1, self.count))


class Stats:
    """The numbers of a dataset's samples. `read` fills them in one pass.

    Per sample read, in order: `numbers` (its place in the index), `captions` (hash), `change` (root mean square of the
    change from latent frame to latent frame), `largest` (the largest |latent|).
    """

    def __init__(self, folder: str | Path, samples: int | None = None):
        self.folder = Path(folder)
        self.card = read_card(folder)
        self.index = SampleIndex(folder, self.card)
        total = len(self.index)
        if samples is not None and samples < 1:
            raise ValueError(f"--samples {samples}: must be at least 1")
        count = min(total, samples or total)
        self.numbers = np.arange(count) * total // count
        self.captions = np.zeros(count, np.uint64)
        self.change = np.zeros(count, np.float32)
        self.largest = np.zeros(count, np.float32)
        self.moments = Moments(self.card["latent"]["channels"])
        self.magnitudes = np.zeros(HALVES, np.int64)  # how often each |float16| occurs
        self.tokens: Counter[int] = Counter()  # clips by their captions' tokens
        self.words: Counter[int] = Counter()

    def read(self) -> "Stats":
        """Reads the samples. Raises SampleError for the first that is not as it was written."""
        everything = len(self.numbers) == len(self.index)
        found = (sample for _, sample in stream_samples(self.folder, self.card)) if everything else self._chosen()
        bar = tqdm(found, "stats", len(self.numbers), unit="clip", leave=False, disable=None)
        for place, sample in enumerate(bar):
            self._add(place, sample)
        return self

    def sample(self, place: int) -> Sample:
        """The sample in this place of those read, once more."""
        file, entry = self.index[int(self.numbers[place])]
        return read_sample(self.folder / file, entry)

    def key(self, place: int) -> str:
        """The name of the sample in this place of those read."""
        return self.index.key(int(self.numbers[place]))

    def _chosen(self) -> Iterator[Sample]:
        for place in range(len(self.numbers)):
            sample = self.sample(place)
            check_sample(self.card, f"{self.folder}: {self.key(place)}", sample)
            yield sample

    def _add(self, place: int, sample: Sample) -> None:
        latent = sample.latent
        self.moments.add(latent.reshape(len(latent), -1))
        magnitudes = latent.view(np.uint16) & (HALVES - 1)  # without the sign; they sort as the values do
        self.magnitudes += np.bincount(magnitudes.ravel(), minlength=HALVES)
        self.largest[place] = MAGNITUDES[magnitudes.max()]
        # The first latent frame stands for one frame, the others for several: they differ in a still picture, too.
        frames = latent[:, 1 if latent.shape[1] > 2 else 0 :].astype(np.float32)
        self.change[place] = np.sqrt(np.mean(np.square(np.diff(frames, axis=1)))) if frames.shape[1] > 1 else np.nan
        caption = caption_of(sample)
        self.captions[place] = int.from_bytes(blake2b(caption.encode(errors="replace"), digest_size=8).digest(), "big")
        self.tokens[len(sample.text)] += 1
        self.words[len(caption.split())] += 1

    @property
    def judged_alone(self) -> bool:
        """Whether each channel should have standard deviation 1. The built-in codec's have it only all together."""
        return self.card["codec"]["name"] != "default"

    @property
    def std_of_all(self) -> float:
        """The root mean square of the channels' standard deviations."""
        return float(np.sqrt(np.mean(np.square(self.moments.std))))

    @property
    def far_off(self) -> np.ndarray:
        """bool [C + 1]: channels, and all together, that are far from mean 0 and standard deviation 1."""
        low, high = STD_LIMITS
        alone = self.moments.std if self.judged_alone else np.ones(len(self.moments.std))
        std, mean = np.append(alone, self.std_of_all), np.append(self.moments.mean, 0.0)
        return (np.abs(mean) > MEAN_LIMIT) | (std < low) | (std > high)

    def quantile(self, share: float) -> float:
        """The value that a share of all |latent| do not exceed."""
        total = np.cumsum(self.magnitudes)
        return float(MAGNITUDES[np.searchsorted(total, share * total[-1])])

    def repeated(self) -> list[tuple[int, int]]:
        """(videos, place of a clip) for each caption, not empty, that several videos have; the commonest first."""
        videos = self.index.rows["video"][self.numbers].astype(np.uint64)
        pairs, places = np.unique(np.stack([self.captions, videos], axis=1), axis=0, return_index=True)
        _, first, counts = np.unique(pairs[:, 0], return_index=True, return_counts=True)
        several = [(int(n), int(places[place])) for place, n in zip(first, counts) if n > 1]
        ordered = sorted(several, key=lambda pair: (-pair[0], pair[1]))
        empty = int.from_bytes(blake2b(b"", digest_size=8).digest(), "big")
        return [(n, place) for n, place in ordered if self.captions[place] != empty]


# ---- tables, the same on the terminal and on the page: rows of (what, value)


def contents(stats: Stats) -> list[tuple[str, str]]:
    """Clips, hours, videos, shards."""
    card, counts, rows = stats.card, stats.card["counts"], stats.index.rows
    video, latent = card["video"], card["latent"]
    seconds = video["frames"] / video["fps"]
    sizes = [shard["samples"] for shard in card["shards"]]
    _, clips = np.unique(rows["video"], return_counts=True)
    lines = [
        (
            "clips",
            f"{len(rows):,} of {seconds:.4g} s ({video['frames']} frames of {size_of(card)}, {video['fps']} fps)",
        ),
        ("video", f"{len(rows) * seconds / 3600:,.4g} hours"),
        ("videos", f"{counts['videos']:,}; {len(clips):,} have clips, {between(clips.min(), clips.max())} each"),
        (
            "shards",
            f"{counts['shards']:,} with {between(min(sizes), max(sizes))} clips, {np.mean(sizes):.1f} on average",
        ),
        ("latents", f"{' x '.join(str(latent[key]) for key in ('channels', 'frames', 'height', 'width'))}, float16"),
        ("codec", f"{card['codec']['name']} {card['codec']['hash'][:12]}"),
        ("text", f"{card['text']['name']} {card['text']['hash'][:12]}, {card['text']['dim']} wide"),
    ]
    if "dropped_seconds" in counts:
        lines.append(("remainders dropped", f"{counts['dropped_seconds'] / 3600:,.4g} hours"))
    return lines


def between(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def size_of(card: dict) -> str:
    return f"{card['video']['height']}x{card['video']['width']}"


def failures(stats: Stats) -> list[tuple[str, str]]:
    """Failed videos by reason, as the card counts them and as failures.jsonl lists them."""
    counted, path = stats.card["counts"]["skipped"], stats.folder / FAILURES
    listed: Counter[str] = Counter()
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    listed[str(json.loads(line)["reason"])] += 1
                except (ValueError, TypeError, KeyError, RecursionError):
                    listed["a line that is none"] += 1
    rows = []
    for reason in sorted({*counted, *listed}):
        known, found = counted.get(reason, 0), listed[reason]
        note = f" in the card, {found} in {FAILURES}" if path.is_file() and known != found else ""
        rows.append((reason, f"{known}{note}"))
    if not path.is_file():
        rows.append((FAILURES, "not here"))
    return rows or [("none", "")]


def sizes(stats: Stats) -> list[tuple[str, str]]:
    """Bytes on disk by kind of file."""
    kinds = {**{shard["file"]: "shards" for shard in stats.card["shards"]}, CARD: "card"}
    kinds[stats.card["index"]["file"]] = "index"
    found: Counter[str] = Counter()
    with os.scandir(stats.folder) as entries:
        for entry in entries:
            if entry.is_file():
                name = entry.name
                record = name.startswith("shard-") and name.endswith(".json")
                found[kinds.get(name, "records" if record else "other files")] += entry.stat().st_size
    rows = [(kind, in_bytes(found[kind])) for kind in ("shards", "records", "index", "card", "other files")]
    hours = len(stats.index) * stats.card["video"]["frames"] / stats.card["video"]["fps"] / 3600
    total = sum(found.values())
    return [*rows, ("per clip", in_bytes(total / len(stats.index))), ("per hour of video", in_bytes(total / hours))]


def in_bytes(number: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:,.4g} TiB"


def captions(stats: Stats) -> list[tuple[str, str]]:
    """Lengths of captions, and how many are empty or used by several videos."""
    limit = stats.card["text"]["max_tokens"]
    repeated = stats.repeated()
    return [
        ("tokens", spread(stats.tokens)),
        ("words", spread(stats.words)),
        ("clips with an empty caption", f"{stats.words[0]:,}"),
        (f"clips at the limit of {limit} tokens", f"{stats.tokens[limit]:,} (longer captions are cut there)"),
        ("captions that several videos have", f"{len(repeated):,}, by {sum(n for n, _ in repeated):,} videos"),
    ]


def spread(lengths: Counter[int]) -> str:
    """Shortest, median and longest."""
    ordered = sorted(lengths)
    total = np.cumsum([lengths[length] for length in ordered])
    median = ordered[int(np.searchsorted(total, total[-1] / 2))]
    return f"{between(ordered[0], ordered[-1])}, median {median}"


def latents(stats: Stats) -> list[tuple[str, str]]:
    """What all latents together are like."""
    mean, std, far = stats.moments.mean, stats.moments.std, np.flatnonzero(stats.far_off[:-1])
    named = ", ".join(map(str, far[:16])) + (", ..." if len(far) > 16 else "")
    change = stats.change[np.isfinite(stats.change)]
    return [
        ("measured clips", f"{len(stats.numbers):,} of {len(stats.index):,}"),
        ("mean per channel", f"{mean.min():.3f} to {mean.max():.3f} (aim 0)"),
        ("standard deviation per channel", f"{std.min():.3f} to {std.max():.3f}{' (aim 1)' * stats.judged_alone}"),
        ("standard deviation of all", f"{stats.std_of_all:.3f} (aim 1){', far off' * bool(stats.far_off[-1])}"),
        ("channels far off", f"{len(far)} of {len(mean)}{f': {named}' if len(far) else ''}"),
        ("|latent|", ", ".join(f"{100 * q:g} % <= {stats.quantile(q):.3g}" for q in (0.5, 0.99, 0.9999))),
        ("largest |latent|", f"{stats.largest.max():.4g}"),
        ("change over time", f"{change.min():.3g} to {change.max():.3g}" if len(change) else "clips of one frame"),
        ("clips without any change", f"{int((change == 0).sum()):,}"),
    ]


SECTIONS = (
    ("Contents", contents),
    ("Failed videos", failures),
    ("On disk", sizes),
    ("Captions", captions),
    ("Latents", latents),
)


def clip_rows(stats: Stats, places: np.ndarray, values: np.ndarray) -> list[list[str]]:
    """A row for each of these clips: key, value, source, span, caption."""
    rows = []
    for place in places:
        sample = stats.sample(place)
        rows.append(
            [
                stats.key(place),
                f"{values[place]:.4g}",
                str(sample.meta.get("source", "")),
                span_of(sample),
                caption_of(sample),
            ]
        )
    return rows


# ---- the page


def page(stats: Stats) -> str:
    """The page on a dataset whose samples were read."""
    name = os.fsencode(stats.folder.resolve().name).decode(errors="replace")
    parts = [f'<h1>{html.escape(name)}</h1><p class="note">{html.escape(stats.card["hash"][:12])}, dataset.json</p>']
    for title, section in SECTIONS:
        parts.append(f"<h2>{title}</h2>{html_table([], [list(row) for row in section(stats)])}")
        if section is captions:
            parts += [length_plots(stats), repeated_table(stats)]
    far = "far off" if stats.far_off.any() else "none far off"
    low, high = STD_LIMITS
    aim = (
        "per channel" if stats.judged_alone else "of all channels together (the built-in codec's first ones have more)"
    )
    parts += [
        f"<h2>Channels: {far}</h2>",
        '<p class="note">Normalised latents are (raw - mean) / std with the numbers of the codec. The aim is mean 0, '
        f"and standard deviation 1 {aim}. Marked: |mean| above {MEAN_LIMIT:g}, or a standard deviation outside of "
        f"{low:g} to {high:g} (shaded). With few or unusual clips this can be as it should be.</p>",
        channel_plot(stats),
        f'<div class="numbers">{channel_table(stats)}</div>',
        "<h2>The largest values, and the change over time</h2>",
        '<p class="note">The change is the root mean square of the difference of neighbouring latent frames, from the '
        "second on: the first one stands for a single frame of video, and differs in a still picture, too.</p>",
        value_plots(stats),
    ]
    order = np.argsort(stats.largest, kind="stable")[::-1][:NAMED]
    parts.append("<h3>Clips with the largest |latent|</h3>" + clip_table(stats, order, stats.largest, "|latent|"))
    changing = np.argsort(stats.change, kind="stable")
    changing = changing[np.isfinite(stats.change[changing])]
    if len(changing):
        for title, chosen in (("smallest", changing[:NAMED]), ("largest", changing[::-1][:NAMED])):
            parts.append(
                f"<h3>Clips with the {title} change{' (frozen?)' if title == 'smallest' else ''}</h3>"
                + clip_table(stats, chosen, stats.change, "change")
            )
    return html_page(f"Statistics of {name}", "".join(parts), STYLE)


def clip_table(stats: Stats, places: np.ndarray, values: np.ndarray, name: str) -> str:
    return html_table(["clip", name, "source", "span", "caption"], clip_rows(stats, places, values))


def repeated_table(stats: Stats) -> str:
    rows = [[caption_of(stats.sample(place)), f"{videos:,}"] for videos, place in stats.repeated()[:NAMED]]
    return f"<h3>Commonest captions</h3>{html_table(['caption', 'videos'], rows)}" if rows else ""


def channel_table(stats: Stats) -> str:
    latent = stats.card["latent"]
    columns = zip(stats.moments.mean, stats.moments.std, latent["mean"], latent["std"], stats.far_off)
    rows = [
        [str(channel), f"{mean:.3f}", f"{std:.3f}", f"{raw_mean:.4g}", f"{raw_std:.4g}", "far off" if far else ""]
        for channel, (mean, std, raw_mean, raw_std, far) in enumerate(columns)
    ]
    rows.append(["all", "", f"{stats.std_of_all:.3f}", "", "", "far off" if stats.far_off[-1] else ""])
    aim = " (aim 1)" if stats.judged_alone else ""
    heads = ["channel", "mean (aim 0)", f"std{aim}", "codec's mean", "codec's std", ""]
    return html_table(heads, rows, np.flatnonzero(stats.far_off))


def channel_plot(stats: Stats) -> str:
    figure, ((means, stds),) = new_figure(10, 2.6, 2)
    channels = np.arange(len(stats.moments.mean))
    colours = [COLOURS[1] if far else COLOURS[0] for far in stats.far_off[:-1]]
    for axes, values, aim, limits, name in (
        (means, stats.moments.mean, 0.0, (-MEAN_LIMIT, MEAN_LIMIT), "mean"),
        (stds, stats.moments.std, 1.0, STD_LIMITS, "standard deviation"),
    ):
        if stats.judged_alone or axes is means:
            axes.axhspan(*limits, color=GREY, alpha=0.12)
        axes.axhline(aim, color=GREY, linewidth=0.8)
        axes.bar(channels, values - aim, bottom=aim, color=colours)
        axes.set(title=f"{name} per channel", xlabel="channel")
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.tight_layout()
    return svg(figure)


def length_plots(stats: Stats) -> str:
    figure, grid = new_figure(10, 2.4, 2)
    for axes, lengths, name in zip(grid.flat, (stats.tokens, stats.words), ("tokens", "words")):
        longest = max(lengths)
        width = max(1, -(-longest // 60))  # at most about 60 bars
        edges = np.arange(0, longest + width + 1, width)
        heights, _ = np.histogram(list(lengths), edges, weights=list(lengths.values()))
        axes.bar(edges[:-1] + (width - 1) / 2, heights, width=0.9 * width, color=COLOURS[0])
        axes.set(title=f"{name} of a caption", xlabel=name, ylabel="clips")
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.tight_layout()
    return svg(figure)


def value_plots(stats: Stats) -> str:
    """|latent| beside that of a normal distribution, and the changes over time."""
    figure, ((values, changes),) = new_figure(10, 2.8, 2)
    edges = np.linspace(0, 1.02 * max(1.0, float(stats.largest.max())), 61)
    heights, _ = np.histogram(MAGNITUDES[:0x7C00], edges, weights=stats.magnitudes[:0x7C00])
    values.bar(edges[:-1], heights, width=np.diff(edges), align="edge", color=COLOURS[0])
    below = np.array([math.erf(edge / math.sqrt(2)) for edge in edges])
    expected = np.diff(below) * heights.sum()
    values.plot((edges[1:] + edges[:-1]) / 2, np.where(expected >= 0.5, expected, np.nan), color=COLOURS[1])
    values.set(yscale="log", ylim=(0.5, None), title="|latent|; line: normal, mean 0, std 1", ylabel="values")
    values.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    finite = stats.change[np.isfinite(stats.change)]
    changes.hist(finite, bins=40, color=COLOURS[0])
    changes.set(title="change over time", xlabel="change from latent frame to latent frame", ylabel="clips")
    figure.tight_layout()
    return svg(figure)


def main(arguments: list[str] | None = None) -> int:
    description = "What a dataset holds, in numbers: a table, and a self-contained page. The dataset is only read."
    parser = argparse.ArgumentParser(prog="data_prep.stats", description=description)
    parser.add_argument("dataset")
    parser.add_argument("--out", metavar="PAGE.html", help="page to write (default: NAME-stats.html, here)")
    parser.add_argument("--samples", type=int, metavar="N", help="measure N clips, evenly spread (default: all)")
    options = parser.parse_args(arguments)
    return run_command(lambda: stats_as_asked(options))


def stats_as_asked(options: argparse.Namespace) -> None:
    """Writes the page, and prints the tables: in this order, for the reader may be `head`."""
    stats = Stats(local_folder(options.dataset, "data_prep.stats"), options.samples)
    try:
        stats.read()
    except SampleError as error:
        verify = f"python -m data_prep.verify {shlex.quote(str(options.dataset))}"
        raise ValueError(f"{error}; this names all damage: {verify}") from None
    out = Path(options.out or f"{stats.folder.resolve().name}-stats.html")
    write_atomic(out, page(stats).encode(errors="replace"))
    for title, section in SECTIONS:
        print(title)
        for what, value in section(stats):
            print(printable(f"  {what:34} {value}"))
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    sys.exit(main())
