"""Sounds of the demo: twelve kinds, synthesised with random parameters over background noise.

Some kinds are deliberately similar: rain and wind, ticking and knocking, siren, whistle and birds.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

import numpy as np

from data_prep.demo.item import DemoItem

SAMPLE_RATE_HZ = 16_000
CLIP_SECONDS = (1.5, 2.0)
HEADROOM_DB = (1.0, 18.0)  # of the peak of a clip below 1

SOUND_TEMPLATES = (
    "the sound of {}",
    "{}",
    "a recording of {}",
    "{} can be heard",
    "this is {}",
    "a short clip of {}",
)
SOUND_PROMPTS = ("the sound of {}", "a recording of {}", "{} can be heard")


# ------------------------------------------------------------------------------ building blocks


def _time(num_samples: int) -> np.ndarray:
    return np.arange(num_samples) / SAMPLE_RATE_HZ


def _tone(frequency_hz: np.ndarray | float, num_samples: int) -> np.ndarray:
    """Returns a sine whose frequency may change from sample to sample."""
    return np.sin(
        2 * np.pi * np.cumsum(np.broadcast_to(frequency_hz, num_samples)) / SAMPLE_RATE_HZ
    )


def _noise(
    num_samples: int, rng: np.random.Generator, *, low_hz: float, high_hz: float, tilt: float = 0
) -> np.ndarray:
    """Returns noise of unit power in a band; its amplitude falls as frequency ** -tilt."""
    padded = 1 << (num_samples - 1).bit_length()  # an FFT of a power of two is much faster
    frequency = np.fft.rfftfreq(padded, 1 / SAMPLE_RATE_HZ) + 1e-9
    shape = (frequency / 1000) ** -tilt / (1 + (low_hz / frequency) ** 4)
    spectrum = (
        shape / (1 + (frequency / high_hz) ** 4) * np.exp(2j * np.pi * rng.random(len(frequency)))
    )
    noise = np.fft.irfft(spectrum, padded)[:num_samples]
    return noise / np.sqrt(np.mean(noise**2))


def _place(clip: np.ndarray, event: np.ndarray, start_seconds: float) -> None:
    """Adds an event to a clip in place; the event is truncated at the end of the clip."""
    start = int(start_seconds * SAMPLE_RATE_HZ)
    room = max(len(clip) - start, 0)
    clip[start : start + len(event)] += event[:room]


def _decay(num_samples: int, seconds: float) -> np.ndarray:
    return np.exp(-_time(num_samples) / seconds)


def _resonance(
    rng: np.random.Generator, *, frequency_hz: float, decay_seconds: float, seconds: float
) -> np.ndarray:
    num_samples = int(seconds * SAMPLE_RATE_HZ)
    ring = _tone(frequency_hz, num_samples) + 0.5 * _tone(frequency_hz * 1.6, num_samples)
    click = _noise(num_samples, rng, low_hz=frequency_hz / 2, high_hz=frequency_hz * 3)
    return (ring + 0.6 * click) * _decay(num_samples, decay_seconds)


# --------------------------------------------------------------------------------------- kinds


def _rain(num_samples: int, rng: np.random.Generator) -> np.ndarray:
    clip = 0.3 * _noise(num_samples, rng, low_hz=800, high_hz=rng.uniform(4000, 7500))
    for _ in range(rng.integers(40, 160)):
        drop = _noise(80, rng, low_hz=1500, high_hz=6000) * _decay(80, 0.001)
        _place(clip, drop * rng.uniform(0.3, 2), rng.uniform(0, num_samples / SAMPLE_RATE_HZ))
    return clip


def _wind(num_samples: int, rng: np.random.Generator) -> np.ndarray:
    body = _noise(num_samples, rng, low_hz=60, high_hz=rng.uniform(300, 900), tilt=0.5)
    howl = _noise(num_samples, rng, low_hz=400, high_hz=rng.uniform(800, 2500))
    swell = 0.5 + 0.5 * _tone(rng.uniform(0.3, 1.2), num_samples)
    return body * (0.4 + swell) + rng.uniform(0.1, 0.4) * howl * swell**2


def _siren(num_samples: int, rng: np.random.Generator) -> np.ndarray:
    sweep = _tone(rng.uniform(0.5, 3), num_samples)
    if rng.random() < 0.4:  # two alternating tones instead of a glide
        sweep = np.sign(sweep)
    frequency = rng.uniform(600, 1100) * 2 ** (rng.uniform(0.25, 0.6) * sweep)
    return sum(_tone(frequency * k, num_samples) / k for k in (1, 2, 3, 4))


def _whistle(num_samples: int, rng: np.random.Generator) -> np.ndarray:
    vibrato = 1 + rng.uniform(0, 0.02) * _tone(rng.uniform(4, 7), num_samples)
    glide = 2 ** (rng.uniform(-0.5, 0.5) * _time(num_samples))
    frequency = rng.uniform(1100, 2400) * vibrato * glide
    breath = _noise(num_samples, rng, low_hz=1000, high_hz=4000)
    envelope = np.minimum(1, 8 * _time(num_samples)) * np.minimum(1, 8 * _time(num_samples)[::-1])
    return (_tone(frequency, num_samples) + rng.uniform(0.02, 0.12) * breath) * envelope


def _birds(num_samples: int, rng: np.random.Generator) -> np.ndarray:
    clip = np.zeros(num_samples)
    start = rng.uniform(0, 0.3)
    base = rng.uniform(2500, 4500)
    while start < num_samples / SAMPLE_RATE_HZ:
        length = int(rng.uniform(0.05, 0.16) * SAMPLE_RATE_HZ)
        bend = np.linspace(0, rng.uniform(-0.6, 0.6), length) + 0.1 * _tone(25, length)
        chirp = _tone(base * 2 ** (bend + rng.uniform(-0.2, 0.2)), length) * np.hanning(length)
        _place(clip, chirp * rng.uniform(0.5, 1), start)
        start += length / SAMPLE_RATE_HZ + rng.uniform(0.03, 0.3)
    return clip


def _ticking(num_samples: int, rng: np.random.Generator) -> np.ndarray:
    clip = np.zeros(num_samples)
    period, pitch = rng.uniform(0.2, 0.5), rng.uniform(1800, 4500)
    starts = np.arange(rng.uniform(0, period), num_samples / SAMPLE_RATE_HZ, period)
    for number, start in enumerate(starts):
        tick_hz = pitch * (1 if number % 2 else 0.8)
        tick = _resonance(rng, frequency_hz=tick_hz, decay_seconds=0.004, seconds=0.03)
        _place(clip, tick, start)
    return clip


def _knocking(num_samples: int, rng: np.random.Generator) -> np.ndarray:
    clip = np.zeros(num_samples)
    period, pitch = rng.uniform(0.16, 0.4), rng.uniform(150, 500)
    start = rng.uniform(0, 0.4)
    for _ in range(rng.integers(2, 6)):
        knock = _resonance(
            rng, frequency_hz=pitch, decay_seconds=rng.uniform(0.015, 0.035), seconds=0.2
        )
        _place(clip, knock * rng.uniform(0.7, 1), start)
        start += period * rng.uniform(0.92, 1.08)
    return clip


def _bell(num_samples: int, rng: np.random.Generator) -> np.ndarray:
    clip = np.zeros(num_samples)
    pitch, decay = rng.uniform(350, 1300), rng.uniform(0.3, 0.9)
    partials = np.array([0.5, 1, 1.19, 1.5, 2, 2.74, 3.76]) * rng.uniform(0.99, 1.01, 7)
    strike = sum(
        _tone(pitch * partial, num_samples) * _decay(num_samples, decay / partial**0.7) / partial
        for partial in partials
        if pitch * partial < 7500
    )
    for start in rng.uniform(0, 0.3) + np.arange(rng.integers(1, 4)) * rng.uniform(0.4, 0.8):
        _place(clip, strike, start)
    return clip


def _plucked_string(num_samples: int, rng: np.random.Generator) -> np.ndarray:
    clip = np.zeros(num_samples)
    pitch, decay = rng.uniform(90, 400), rng.uniform(0.4, 1.0)
    start = rng.uniform(0, 0.3)
    for _ in range(rng.integers(1, 5)):
        harmonics = range(1, int(min(11, 7000 / pitch)))
        pluck = sum(
            _tone(pitch * k, num_samples) * _decay(num_samples, decay / k**0.8) / k
            for k in harmonics
        )
        _place(clip, pluck, start)
        start += rng.uniform(0.25, 0.6)
        pitch *= 2 ** (rng.integers(-5, 8) / 12)
        pitch = float(np.clip(pitch, 80, 700))
    return clip


def _engine(num_samples: int, rng: np.random.Generator) -> np.ndarray:
    revs = 2 ** (rng.uniform(-0.4, 0.8) * _time(num_samples) + 0.02 * _tone(7, num_samples))
    frequency = rng.uniform(35, 90) * revs
    harmonics = rng.uniform(0.3, 1, 15) / np.arange(1, 16) ** 0.6
    hum = sum(
        level * _tone(frequency * k, num_samples) for k, level in enumerate(harmonics, start=1)
    )
    rattle = _noise(num_samples, rng, low_hz=100, high_hz=2500, tilt=0.5)
    return hum + rattle * (1 + _tone(frequency, num_samples)) * rng.uniform(0.3, 0.8)


def _alarm(num_samples: int, rng: np.random.Generator) -> np.ndarray:
    period, fraction = rng.uniform(0.15, 0.6), rng.uniform(0.4, 0.7)
    is_on = (_time(num_samples) / period + rng.random()) % 1 < fraction
    pitch = rng.uniform(900, 2600)
    beep = _tone(pitch, num_samples) + rng.uniform(0, 0.5) * _tone(3 * pitch % 7500, num_samples)
    return beep * np.convolve(is_on, np.ones(80) / 80, mode="same")


def _barking(num_samples: int, rng: np.random.Generator) -> np.ndarray:
    clip = np.zeros(num_samples)
    pitch, start = rng.uniform(250, 650), rng.uniform(0, 0.3)
    for _ in range(rng.integers(1, 5)):
        length = int(rng.uniform(0.1, 0.22) * SAMPLE_RATE_HZ)
        falling = pitch * np.linspace(1.25, 0.75, length)
        voice = sum(_tone(falling * k, length) / k**0.5 for k in (1, 2, 3, 4, 5))
        rasp = _noise(length, rng, low_hz=pitch, high_hz=pitch * 5)
        bark = (voice + rng.uniform(0.8, 2) * rasp) * np.hanning(length) ** 0.7
        _place(clip, bark * rng.uniform(0.7, 1), start)
        start += length / SAMPLE_RATE_HZ + rng.uniform(0.1, 0.45)
    return clip


# Class name -> (synthesis, phrases in captions).
SOUNDS = {
    "rain": (_rain, ("rain", "rain falling", "a rain shower", "raindrops")),
    "wind": (_wind, ("wind", "wind blowing", "a gust of wind", "stormy wind")),
    "a siren": (_siren, ("a siren", "a police siren", "a siren wailing", "an ambulance siren")),
    "a whistle": (_whistle, ("a whistle", "someone whistling", "a person whistling a note")),
    "a bird": (_birds, ("a bird", "birds chirping", "a bird singing", "birdsong")),
    "a ticking clock": (_ticking, ("a ticking clock", "a clock ticking", "a watch ticking")),
    "knocking": (_knocking, ("knocking", "knocking on a door", "someone knocking on wood")),
    "a bell": (_bell, ("a bell", "a bell ringing", "a church bell", "the chime of a bell")),
    "a plucked string": (
        _plucked_string,
        ("a plucked string", "a guitar being plucked", "notes on a plucked string"),
    ),
    "an engine": (_engine, ("an engine", "an engine running", "a motor humming", "a car engine")),
    "an alarm": (_alarm, ("an alarm", "an alarm beeping", "beeps of an alarm", "an alarm clock")),
    "a dog": (_barking, ("a dog", "a dog barking", "barks of a dog", "a barking dog")),
}


# --------------------------------------------------------------------------------------- clips


def sound_items(
    *, clips_per_sound: int, num_captions: int, seed: Sequence[int]
) -> Iterator[DemoItem]:
    """Yields new clips of every kind, in shuffled order, alternating between WAV and FLAC."""
    kinds = [kind for kind in SOUNDS for _ in range(clips_per_sound)]
    order = np.random.default_rng(seed).permutation(len(kinds))
    for number, index in enumerate(order):
        kind, rng = kinds[index], np.random.default_rng([*seed, number])
        captions = [sound_caption(kind, rng) for _ in range(num_captions)]
        extension = ("wav", "flac")[number % 2]
        content = encode_sound(synthesise(kind, rng), extension)
        files = {f"{number:05d}.{extension}": content}
        yield DemoItem(files, tuple(dict.fromkeys(captions)), (kind,))


def sound_caption(kind: str, rng: np.random.Generator) -> str:
    """Returns a random caption for a kind of sound."""
    phrases = SOUNDS[kind][1]
    template = SOUND_TEMPLATES[rng.integers(len(SOUND_TEMPLATES))]
    return template.format(phrases[rng.integers(len(phrases))])


def synthesise(
    kind: str, rng: np.random.Generator, *, headroom_db: tuple[float, float] = HEADROOM_DB
) -> np.ndarray:
    """Synthesizes a sound over noise, at a random level: float64 [samples] in [-1, 1].

    Args:
        kind: key of SOUNDS.
        rng: random numbers of the clip.
        headroom_db: range of the distance of the peak from 1.
    """
    num_samples = int(rng.uniform(*CLIP_SECONDS) * SAMPLE_RATE_HZ)
    clip = SOUNDS[kind][0](num_samples, rng)
    clip = clip / np.sqrt(np.mean(clip**2))
    noise = _noise(num_samples, rng, low_hz=50, high_hz=6000, tilt=rng.uniform(0, 1))
    clip += noise * 10 ** (-rng.uniform(6, 25) / 20)  # signal to noise: 6 to 25 dB
    return clip / np.abs(clip).max() * 10 ** (-rng.uniform(*headroom_db) / 20)


def encode_sound(clip: np.ndarray, extension: str) -> bytes:
    """Encodes a clip as a 16-bit file."""
    import soundfile

    sink = io.BytesIO()
    samples = (clip * 32767).round().astype(np.int16)
    soundfile.write(sink, samples, SAMPLE_RATE_HZ, format=extension.upper(), subtype="PCM_16")
    return sink.getvalue()
