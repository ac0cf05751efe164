"""Sequence-classification tasks whose label lives in who stands next to whom (NumPy only).

    proximity  a walk on a circle of symbols: does it step up or down?
    text       English, half of it printed backwards: which way does it run?
    texture    a square image, flattened: is it correlated along rows or along columns?
    bag        the control: the label is in the token counts, and order means nothing

Every generator returns `tokens` (n, T) int64 in [0, V) and `labels` (n,) int64, classes balanced,
and is its own complete recipe, so that it can be copied alone. Letters in shape comments: n
sequences, T tokens in each, V symbols, K classes.
"""
from math import isqrt
from pathlib import Path

import numpy as np

TASKS = ("proximity", "text", "texture", "bag")


def proximity(*, n, seq_len, vocab_size, signal=0.5, seed=0):
    """The arrow of time: each token is the previous one, one symbol up or down.

    x_t = x_{t-1} + s (mod V) with probability `signal`, else uniform on V symbols; s = +1 in
    class 1, s = -1 in class 0. Three exact properties make it the headline task:
      * token counts say nothing: every token is uniform, in both classes;
      * reversal swaps the classes, so a classifier that ignores order, or knows only distances
        |i - j|, is right half the time;
      * the best possible classifier is known: it counts steps up minus steps down.
    `seed`: anything np.random.default_rng takes. Raises ValueError where vocab_size < 3: then a
    step up is a step down.
    """
    if vocab_size < 3:
        raise ValueError(f"vocab_size {vocab_size}: proximity needs 3 symbols or more")
    rng = np.random.default_rng(seed)
    labels = rng.permutation(n) % 2                                   # (n,), balanced classes
    tokens = rng.integers(vocab_size, size=(n, seq_len))              # (n, T), the uniform part
    follows = rng.random((n, seq_len)) < signal                       # (n, T)
    for t in range(1, seq_len):
        stepped = (tokens[:, t - 1] + 2 * labels - 1) % vocab_size    # (n,)
        tokens[:, t] = np.where(follows[:, t], stepped, tokens[:, t])
    return tokens, labels


def texture(*, n, seq_len, vocab_size, signal=0.6, seed=0):
    """Proximity in two dimensions: a side x side image, T = side², flattened row by row.

    Each pixel copies its left neighbour (class 0) or its upper neighbour (class 1) with
    probability `signal`, else it is uniform. In the flat sequence these stand at offsets -1 and
    -side. Raises ValueError where seq_len is no square.
    """
    side = isqrt(seq_len)
    if side * side != seq_len:
        raise ValueError(f"seq_len {seq_len}: texture needs a square number of tokens, such as 64")
    rng = np.random.default_rng(seed)
    labels = rng.permutation(n) % 2                                   # (n,), balanced classes
    image = rng.integers(vocab_size, size=(n, side, side))            # (n, side, side)
    follows = rng.random((n, side, side)) < signal                    # (n, side, side)
    # Build every image row by row, then turn class 0 on its side.
    for row in range(1, side):
        image[:, row] = np.where(follows[:, row], image[:, row - 1], image[:, row])
    image = np.where(labels[:, None, None] == 1, image, image.swapaxes(1, 2))
    return image.reshape(n, seq_len), labels


def bag(*, n, seq_len, vocab_size, signal=0.2, seed=0):
    """The control: class 1 prefers the upper half of the symbols, class 0 the lower half.

    A token is drawn from its class's preferred half with probability `signal`, else from all
    symbols, each on its own: order carries nothing. Raises ValueError where vocab_size is odd.
    """
    if vocab_size % 2:
        raise ValueError(f"vocab_size {vocab_size}: bag needs an even number of symbols")
    rng = np.random.default_rng(seed)
    half = vocab_size // 2
    labels = rng.permutation(n) % 2                                   # (n,), balanced classes
    anywhere = rng.integers(vocab_size, size=(n, seq_len))            # (n, T)
    preferred = rng.integers(half, size=(n, seq_len)) + half * labels[:, None]  # (n, T)
    return np.where(rng.random((n, seq_len)) < signal, preferred, anywhere), labels


def text(*, n_train, n_test, seq_len, vocab_size, path=None, seed=0):
    """Real English, half of the windows printed backwards: label 1 reads forwards, 0 backwards.

    The text is the UTF-8 file `path`; by default Python's own manual (`pydoc_data.topics`, which
    ships with CPython and differs a little between versions), lower-cased, white space folded. Its
    last fifth is the test part. Windows of `seq_len` characters never overlap; test windows that
    share seq_len / 2 characters in a row with the training part are left out, as manuals repeat
    themselves. The `vocab_size - 1` most frequent characters of the training part are symbols of
    their own; all others share the last one. Reversal keeps every character count.

    Returns train tokens, train labels, test tokens and test labels; n is `n_train` and `n_test`,
    or as many windows as the text holds. Raises OSError for a file that cannot be read, ValueError
    for one that is not UTF-8 text or leaves fewer than 10 windows to a part.
    """
    from pydoc_data.topics import topics
    manual = " ".join(topics[name] for name in sorted(topics))
    try:
        raw = manual if path is None else Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"text {path}: not UTF-8 text") from None
    raw = " ".join(raw.lower().split())                               # white space folded
    cut, half = len(raw) * 4 // 5, seq_len // 2
    characters, counts = np.unique(list(raw[:cut]), return_counts=True)
    frequent = characters[np.argsort(-counts, kind="stable")][:vocab_size - 1]  # (V - 1,)
    symbol = {character: s for s, character in enumerate(frequent.tolist())}
    # Rare characters share the last symbol.
    points = np.array([symbol.get(character, vocab_size - 1) for character in raw])
    known = {raw[i:i + half] for i in range(cut - half + 1)}          # all training passages
    # Windows of the training part, then those of the test part.
    starts = [range(0, cut - seq_len + 1, seq_len),
              [start for start in range(cut, len(raw) - seq_len + 1, seq_len)
               if known.isdisjoint(raw[start + i:start + i + half] for i in range(half + 1))]]
    parts = []
    for stream, (start, n) in enumerate(zip(starts, (n_train, n_test))):
        if len(start) < 10:
            raise ValueError(f"text {path}: {len(start)} windows of {seq_len} characters, needs 10")
        rng = np.random.default_rng([seed, stream])
        chosen = np.array(start)[rng.permutation(len(start))[:n]]     # (n,)
        windows = points[chosen[:, None] + np.arange(seq_len)]        # (n, T)
        labels = rng.permutation(len(windows)) % 2                    # (n,), balanced classes
        parts += [np.where(labels[:, None] == 1, windows, windows[:, ::-1]), labels]
    return tuple(parts)


def make_task(name, *, n_train, n_test, seq_len, vocab_size, signal=0.5, path=None, seed=0):
    """Train tokens and labels, test tokens and labels of the task `name`, from separate streams.

    `signal` is for all tasks but `text`; `path` is the file of `text`. Raises what the task raises.
    """
    sizes = dict(seq_len=seq_len, vocab_size=vocab_size)
    if name == "text":
        return text(n_train=n_train, n_test=n_test, path=path, seed=seed, **sizes)
    draw = {"proximity": proximity, "texture": texture, "bag": bag}[name]
    return (*draw(n=n_train, signal=signal, seed=[seed, 0], **sizes),
            *draw(n=n_test, signal=signal, seed=[seed, 1], **sizes))


def from_file(path, seed=0):
    """Your own sequences: an .npz with integers `tokens` (n, T) from 0 up and `labels` (n,).

    Labels are integers or names. `test_tokens` and `test_labels` are used where the file has them;
    otherwise a random fifth is the test part. Returns train tokens and labels, test tokens and
    labels, int64, labels as 0 ... K - 1. Raises ValueError. Nothing in the file is ever
    executed (allow_pickle=False).
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            parts = [(file[kind + "tokens"], file[kind + "labels"]) for kind in ("", "test_")
                     if kind == "" or {"test_tokens", "test_labels"} & set(file)]
    except Exception as error:    # numpy, zipfile and zlib raise a dozen kinds on a damaged file
        raise ValueError(f"data {path}: {error}; must be an .npz of tokens and labels, with "
                         "test_tokens and test_labels or not; objects need .astype(str)") from None
    for x, y in parts:
        fits = (x.ndim == 2 and x.size > 0 and x.dtype.kind in "iu" and x.min() >= 0
                and x.shape[1] == parts[0][0].shape[1])
        if not fits or y.shape != x.shape[:1] or y.dtype.kind not in "iuU":
            raise ValueError(f"data {path}: needs tokens (n, T), integers from 0 up, one T, labels "
                             f"(n,), integers, names; has {x.dtype} {x.shape}, {y.dtype} {y.shape}")
    # A random fifth becomes the test.
    if len(parts) == 1:
        order = np.random.default_rng(seed).permutation(len(x))       # (n,)
        parts = [(x[rows], y[rows]) for rows in np.split(order, [len(x) - max(1, len(x) // 5)])]
    (x, y), (x_test, y_test) = parts                                  # (n, T), (n,) twice
    names = np.unique(y)                                              # (K,), sorted
    if len(names) < 2 or not np.isin(y_test, names).all():
        raise ValueError(f"data {path}: the training part needs 2 classes, and all of the test's")
    return (x.astype(np.int64), np.searchsorted(names, y),
            x_test.astype(np.int64), np.searchsorted(names, y_test))


# ---------------------------------------------------------------------------------------------
# Two yardsticks: what the best classifier of all would score, and what counting alone scores.
# ---------------------------------------------------------------------------------------------
def best_possible_accuracy(name, tokens, labels, vocab_size):
    """Accuracy of the Bayes-optimal classifier on these sequences; None where it is not known.

    With two classes that are equally likely it is the sign of the log-likelihood ratio, which is
    a positive constant (it depends on `signal`) times a difference of counts. A tie counts half.
    """
    if name == "proximity":    # steps up minus steps down
        step = np.diff(tokens) % vocab_size                            # (n, T - 1)
        evidence = (step == 1).sum(1) - (step == vocab_size - 1).sum(1)  # (n,)
    elif name == "texture":    # pixels like their upper neighbour minus those like their left one
        side = isqrt(tokens.shape[1])
        image = tokens.reshape(-1, side, side)                         # (n, side, side)
        evidence = (np.diff(image, axis=1) == 0).sum((1, 2)) - (np.diff(image) == 0).sum((1, 2))
    elif name == "bag":        # symbols of the upper half minus those of the lower half
        evidence = np.where(tokens >= vocab_size // 2, 1, -1).sum(1)   # (n,)
    else:    # text, files: nobody knows
        return None
    return float(np.where(evidence == 0, 0.5, (evidence > 0) == labels).mean())


def count_baseline(train_tokens, train_labels, test_tokens, test_labels):
    """Test accuracy of naive Bayes on token counts: what can be had without looking at order.

    tokens (n, T), labels (n,) from 0 up.
    """
    n_symbols = max(train_tokens.max(), test_tokens.max()) + 1        # V
    scores = []
    for k in range(train_labels.max() + 1):
        tokens = train_tokens[train_labels == k]                      # (n in the class, T)
        counts = np.bincount(tokens.ravel(), minlength=n_symbols) + 1  # (V,), add-one smoothing
        log_prior = np.log(len(tokens) / len(train_tokens))
        scores.append(log_prior + np.log(counts / counts.sum())[test_tokens].sum(1))  # (n,)
    return float((np.argmax(scores, axis=0) == test_labels).mean())
