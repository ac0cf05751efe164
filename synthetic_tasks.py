"""Sequence-classification tasks whose label lives in who stands next to whom (NumPy only).

    proximity  a walk on a circle of symbols: does it step up or down?
    text       English, half of it printed backwards: which way does it run?
    texture    a square image, flattened: is it correlated along rows or along columns?
    bag        the control: the label is in the token counts, and order means nothing

Tokens are (n, T) int64 in [0, V) and labels (n,) int64, with as many of either class. All
generators but `text` are complete in themselves, so that they can be copied alone. Below them come
your own sequences, and the baselines that stand beside a result. Letters in shape comments: n
sequences, T tokens in each, V symbols, K classes.
"""
from math import isqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np

TASKS = ("proximity", "text", "texture", "bag")


# ---------------------------------------------------------------------------------------------
# The tasks
# ---------------------------------------------------------------------------------------------
def proximity(*, n, seq_len, vocab_size, signal=0.5, seed=0):
    """The arrow of time: each token is the previous one, one symbol up or down, or a random one.

        class 1, V = 8:  2 3 4 0 1 2 5 6 ...   steps of +1, between random tokens
        class 0, V = 8:  6 5 4 1 0 7 2 1 ...   steps of -1 (0 is followed by 7)

    A token follows its class's rule with probability `signal`; otherwise it is uniform on the V
    symbols. Three exact properties make this the headline task:
      * token counts say nothing: every token is uniform, in both classes;
      * reversal swaps the classes, so a classifier that ignores order is right half the time;
      * the best possible classifier is known: it counts steps up minus steps down.
    `seed` is anything np.random.default_rng takes. Raises ValueError where vocab_size < 3: then a
    step up is a step down.
    """
    if vocab_size < 3:
        raise ValueError(f"vocab_size {vocab_size}: proximity needs 3 symbols or more")
    rng = np.random.default_rng(seed)
    labels = rng.permutation(n) % 2                                   # (n,), balanced classes
    tokens = rng.integers(vocab_size, size=(n, seq_len))              # (n, T), the uniform part
    follows = rng.random((n, seq_len)) < signal                       # (n, T)
    step = 2 * labels - 1                                             # (n,), +1 or -1
    for t in range(1, seq_len):
        stepped = (tokens[:, t - 1] + step) % vocab_size              # (n,)
        tokens[:, t] = np.where(follows[:, t], stepped, tokens[:, t])
    return tokens, labels


def texture(*, n, seq_len, vocab_size, signal=0.6, seed=0):
    """Proximity in two dimensions: a side x side image, T = side², flattened row by row.

    Each pixel copies its left neighbour (class 0) or its upper neighbour (class 1) with
    probability `signal`; otherwise it is uniform. In the flat sequence these neighbours stand at
    offsets -1 and -side. Raises ValueError where seq_len is not a square.
    """
    side = isqrt(seq_len)
    if side * side != seq_len:
        raise ValueError(f"seq_len {seq_len}: texture needs a square number of tokens, such as 64")
    rng = np.random.default_rng(seed)
    labels = rng.permutation(n) % 2                                   # (n,), balanced classes
    image = rng.integers(vocab_size, size=(n, side, side))            # (n, side, side)
    follows = rng.random((n, side, side)) < signal                    # (n, side, side)
    # Every pixel may copy its upper neighbour, row by row from the top.
    for row in range(1, side):
        image[:, row] = np.where(follows[:, row], image[:, row - 1], image[:, row])
    # An image of class 0 is turned on its side: upper neighbours become left ones.
    on_its_side = image.swapaxes(1, 2)                                # (n, side, side)
    image = np.where(labels[:, None, None] == 1, image, on_its_side)  # (n, side, side)
    return image.reshape(n, seq_len), labels


def bag(*, n, seq_len, vocab_size, signal=0.2, seed=0):
    """The control: class 1 prefers the upper half of the symbols, class 0 the lower half.

    A token is drawn from its class's preferred half with probability `signal`, else from all
    symbols. Each is drawn on its own: order carries nothing. Raises ValueError where vocab_size
    is odd.
    """
    if vocab_size % 2 == 1:
        raise ValueError(f"vocab_size {vocab_size}: bag needs an even number of symbols")
    rng = np.random.default_rng(seed)
    half = vocab_size // 2
    labels = rng.permutation(n) % 2                                   # (n,), balanced classes
    anywhere = rng.integers(vocab_size, size=(n, seq_len))            # (n, T)
    preferred = rng.integers(half, size=(n, seq_len))                 # (n, T), the lower half
    preferred = preferred + half * labels[:, None]                    # (n, T)
    follows = rng.random((n, seq_len)) < signal                       # (n, T)
    return np.where(follows, preferred, anywhere), labels


def text(*, n_train, n_test, seq_len, vocab_size, path=None, seed=0):
    """Real English, half of the windows printed backwards: label 1 reads forwards, 0 backwards.

    The text is the UTF-8 file `path`. The default is Python's own manual (`pydoc_data.topics`,
    which ships with CPython and differs a little between versions). It is lower-cased and its
    white space folded. Windows of `seq_len` characters never overlap. Those of the last fifth are
    the test part, but for windows that share half their characters in a row with the training
    part: manuals repeat themselves. The `vocab_size - 1` most frequent characters of the training
    part are symbols of their own; all others share the last one.

    Returns train tokens, train labels, test tokens and test labels; n is `n_train` and `n_test`,
    or as many windows as the text holds. Raises OSError for a file that cannot be read, and
    ValueError for one that is not UTF-8 or leaves fewer than 10 windows to a part.
    """
    characters = read_text(path)
    cut = len(characters) * 4 // 5    # where the test part begins
    symbols = text_symbols(characters, cut, vocab_size)               # (characters,)
    train_starts = list(range(0, cut - seq_len + 1, seq_len))
    test_starts = list(range(cut, len(characters) - seq_len + 1, seq_len))
    if len(train_starts) >= 10:
        test_starts = unseen_windows(characters, cut, test_starts, seq_len)
    for starts in (train_starts, test_starts):
        if len(starts) < 10:
            raise ValueError(f"text {path or 'of the manual'}: {len(starts)} windows of {seq_len} "
                             "characters in a part that are not in the other, needs 10")
    train = text_windows(symbols, train_starts, n_train, seq_len, [seed, 0])
    test = text_windows(symbols, test_starts, n_test, seq_len, [seed, 1])
    return (*train, *test)


def read_text(path):
    """The text of a UTF-8 file, or of Python's manual, in lower case with white space folded."""
    if path is None:
        from pydoc_data.topics import topics
        raw = " ".join(topics[name] for name in sorted(topics))
    else:
        try:
            raw = Path(path).read_text(encoding="utf-8-sig")    # with its mark or without
        except UnicodeDecodeError:
            raise ValueError(f"text {path}: not UTF-8 text") from None
    return " ".join(raw.lower().split())


def text_symbols(characters, cut, vocab_size):
    """Every character as a symbol, (characters,): 0 is the most frequent one before `cut`."""
    found, counts = np.unique(list(characters[:cut]), return_counts=True)
    by_frequency = found[np.argsort(-counts, kind="stable")]
    symbol = {}
    for character in by_frequency[:vocab_size - 1].tolist():
        symbol[character] = len(symbol)
    rare = vocab_size - 1
    return np.array([symbol.get(character, rare) for character in characters])


def unseen_windows(characters, cut, starts, seq_len):
    """Those of the windows at `starts` that share no half window with the text before `cut`."""
    half = seq_len // 2
    # A hash stands for a passage: the passages themselves would fill the memory.
    seen = {hash(characters[i:i + half]) for i in range(cut - half + 1)}
    unseen = []
    for start in starts:
        passages = range(start, start + seq_len - half + 1)
        if not any(hash(characters[i:i + half]) in seen for i in passages):
            unseen.append(start)
    return unseen


def text_windows(symbols, starts, n, seq_len, seed):
    """At most n windows (n, T) at random ones of `starts`, and their labels (n,): 0 is reversed."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(starts)[:n]                              # (n,)
    windows = symbols[chosen[:, None] + np.arange(seq_len)]           # (n, T)
    labels = rng.permutation(len(windows)) % 2                        # (n,), balanced classes
    tokens = np.where(labels[:, None] == 1, windows, windows[:, ::-1])  # (n, T)
    return tokens, labels


def make_task(name, *, n_train, n_test, seq_len, vocab_size, signal=0.5, path=None, seed=0):
    """Train tokens and labels, test tokens and labels of the task `name`, from separate streams.

    `signal` is for all tasks but `text`; `path` is the file of `text`. Raises what the task raises.
    """
    sizes = dict(seq_len=seq_len, vocab_size=vocab_size)
    if name == "text":
        return text(n_train=n_train, n_test=n_test, path=path, seed=seed, **sizes)
    generators = dict(proximity=proximity, texture=texture, bag=bag)
    generate = generators[name]
    train = generate(n=n_train, signal=signal, seed=[seed, 0], **sizes)
    test = generate(n=n_test, signal=signal, seed=[seed, 1], **sizes)
    return (*train, *test)


# ---------------------------------------------------------------------------------------------
# Your own sequences
# ---------------------------------------------------------------------------------------------
class Data(NamedTuple):
    """Both parts of a data set, int64, and what its numbers mean."""
    tokens: np.ndarray         # (n, T), in [0, V]; V is the mask symbol
    labels: np.ndarray         # (n,), in [0, K)
    test_tokens: np.ndarray    # (n, T)
    test_labels: np.ndarray    # (n,)
    symbols: list              # V of them: token i was symbols[i]
    classes: list              # K of them: label k was classes[k]
    unseen: float = 0.0        # share of test tokens, but pads, that the training part has not


def from_file(path, seed=0):
    """Your own sequences: an .npz file with `tokens` (n, T) and `labels` (n,); returns Data.

        np.savez("mine.npz", tokens=tokens, labels=labels, pad=0)

    Tokens are integers of any value, whole floats, booleans, characters or words. They become
    symbols 0 ... V - 1 by np.unique of the training part. Labels are integers, whole floats,
    booleans or names, and become classes 0 ... K - 1 likewise. `pad`, where the file has it, is the
    value that fills up short sequences. It becomes V, the mask symbol, and so does a test token
    that the training part does not have. The test part is `test_tokens` and `test_labels` where the
    file has them. Otherwise it is a random fifth of the distinct sequences, so that copies of a
    sequence never stand on both sides.

    Raises ValueError, which names the array, what it is and what is needed, and OSError where the
    file cannot be opened. Nothing in the file is ever executed.
    """
    arrays = read_arrays(path)
    tokens = usable_tokens(path, "tokens", arrays)
    labels = usable_labels(path, "labels", arrays, len(tokens))
    if "test_tokens" in arrays or "test_labels" in arrays:
        test_tokens = usable_tokens(path, "test_tokens", arrays)
        test_labels = usable_labels(path, "test_labels", arrays, len(test_tokens))
    else:
        in_test = random_fifth(tokens, labels, seed)                  # (n,)
        test_tokens = tokens[in_test]
        test_labels = labels[in_test]
        tokens = tokens[~in_test]
        labels = labels[~in_test]
    if len(test_tokens) == 0:
        raise ValueError(f"data {path}: no sequence is left for the test part; needs more")
    check_kinds(path, "labels", labels, "test_labels", test_labels)
    check_kinds(path, "tokens", tokens, "test_tokens", test_tokens)
    if test_tokens.shape[1] != tokens.shape[1]:
        raise ValueError(f"data {path}: training sequences have {tokens.shape[1]} tokens, test "
                         f"sequences {test_tokens.shape[1]}; all need one length")
    symbols = np.unique(tokens)                                       # (V,), sorted
    is_pad = np.zeros(test_tokens.shape, dtype=bool)                  # (n, T)
    if "pad" in arrays:
        pad = whole_numbers(arrays["pad"])
        if pad.size != 1 or not are_of_a_kind(pad, tokens):
            raise ValueError(f"data {path}: pad is {pad.dtype} {pad.shape}; needs one value like "
                             f"those of tokens, which are {tokens.dtype}")
        symbols = symbols[symbols != pad.item()]
        is_pad = test_tokens == pad.item()
    classes = np.unique(labels)                                       # (K,), sorted
    if len(symbols) < 2:
        raise ValueError(f"data {path}: tokens has too few symbols, {symbols}; needs two")
    if len(classes) < 2:
        raise ValueError(f"data {path}: labels has one class, {classes}; needs two")
    if not np.isin(test_labels, classes).all():
        raise ValueError(f"data {path}: labels of the test part has classes that the training part "
                         "has not; needs no others")
    x_test = index_in(symbols, test_tokens)                           # (n, T)
    is_unseen = (x_test == len(symbols)) & ~is_pad
    unseen = float(is_unseen.sum() / max(1, (~is_pad).sum()))
    return Data(index_in(symbols, tokens), index_in(classes, labels),
                x_test, index_in(classes, test_labels),
                symbols.tolist(), classes.tolist(), unseen)


def random_fifth(tokens, labels, seed):
    """Which of the sequences tokens (n, T) are the test part, (n,) bool; copies go together."""
    _, first, number = np.unique(tokens, axis=0, return_index=True, return_inverse=True)
    first_copy = first[number.reshape(-1)]                            # (n,), the row of the first
    order = np.random.default_rng(seed).permutation(np.sort(first))   # (distinct sequences,)
    in_test = np.isin(first_copy, order[:max(1, len(order) // 5)])    # (n,)
    # A class that would be missing in the training part gets a sequence back.
    for k in np.unique(labels):
        of_class = labels == k
        if in_test[of_class].all():
            in_test[first_copy == first_copy[of_class][0]] = False
    return in_test


def read_arrays(path):
    """The arrays of an .npz file by name. Raises ValueError, or OSError if it cannot be opened."""
    how = "needs an .npz: np.savez('mine.npz', tokens=tokens, labels=labels)"
    arrays = {}
    with open(path, "rb") as stream:
        try:
            file = np.load(stream, allow_pickle=False)
        except Exception:    # zipfile and numpy raise many kinds, and speak of pickles
            raise ValueError(f"data {path}: not an .npz file, or a damaged one; {how}") from None
        if isinstance(file, np.ndarray):
            raise ValueError(f"data {path}: a single array (.npy); {how}")
        for name in ("tokens", "labels", "test_tokens", "test_labels", "pad"):
            if name in file:
                arrays[name] = read_array(path, file, name)
        for name in ("tokens", "labels"):
            if name not in file:
                raise ValueError(f"data {path}: has no {name}, only {', '.join(file.files)}; {how}")
    return arrays


def read_array(path, file, name):
    """The array `name` of an open .npz file; otherwise ValueError says why not."""
    try:
        array = file[name]
    except Exception as error:    # zipfile, zlib and numpy raise many kinds
        problem = f"cannot be read, {error}"
        if "pickle" in str(error):    # what numpy says of objects, which could execute anything
            problem = ("is an array of objects, which is not read, because that could execute "
                       "anything; needs rows of one length, and .astype(str) for names")
        raise ValueError(f"data {path}: {name} {problem}") from None
    if not isinstance(array, np.ndarray):
        raise ValueError(f"data {path}: {name} cannot be read, it is no array")
    return array


def whole_numbers(array):
    """Whole floats as int64, as far as they are exact; any other array as it is."""
    if array.dtype.kind == "f" and np.isfinite(array).all() and (array % 1 == 0).all():
        if (np.abs(array.astype(np.float64)) <= 2**53).all():
            return array.astype(np.int64)
    return array


def usable_tokens(path, name, arrays):
    """The array `name`, (n, T), if it can be tokens; otherwise ValueError says why not."""
    if name not in arrays:
        raise ValueError(f"data {path}: has no {name}; needs {name} (n, T), one row a sequence")
    tokens = whole_numbers(arrays[name])
    found = f"data {path}: {name} is {tokens.dtype} {tokens.shape}"
    if tokens.dtype.kind == "f":
        raise ValueError(f"{found}; tokens must be discrete: cut values into levels with "
                         "np.digitize(values, np.quantile(values, np.arange(1, 16) / 16))")
    if tokens.dtype.kind not in "iubUS":
        raise ValueError(f"{found}; needs integers, booleans, characters or words")
    if tokens.ndim != 2 or len(tokens) == 0 or tokens.shape[1] < 3:
        raise ValueError(f"{found}; needs (n, T), sequences of 3 tokens or more")
    return tokens


def usable_labels(path, name, arrays, n):
    """The array `name` as (n,) labels; otherwise ValueError says why not."""
    if name not in arrays:
        raise ValueError(f"data {path}: has no {name}; needs {name} ({n},), one for each sequence")
    labels = whole_numbers(arrays[name])
    found = f"data {path}: {name} is {labels.dtype} {labels.shape}"
    if labels.shape not in ((n,), (n, 1)):
        raise ValueError(f"{found}; needs ({n},), one for each sequence")
    if labels.dtype.kind not in "iubUS":
        raise ValueError(f"{found}; needs classes: integers, booleans, names or whole floats")
    return labels.reshape(n)


def are_of_a_kind(array, other):
    """Whether both hold numbers, or both the same kind of text."""
    kinds = {array.dtype.kind, other.dtype.kind}
    return len(kinds) == 1 or kinds <= set("iub")


def check_kinds(path, name, array, other_name, other):
    """Raise ValueError where values of two arrays cannot be compared exactly."""
    # Beside signed integers, uint64 would be compared as floats, which are not exact above 2^53.
    if not are_of_a_kind(array, other) or np.result_type(array, other).kind == "f":
        raise ValueError(f"data {path}: {name} is {array.dtype} but {other_name} {other.dtype}; "
                         "needs one type")


def index_in(known, values):
    """Where each of `values` stands in the sorted array `known`; len(known) if it does not."""
    index = np.searchsorted(known, values)
    index = np.minimum(index, len(known) - 1)
    return np.where(known[index] == values, index, len(known))


# ---------------------------------------------------------------------------------------------
# Baselines: what naming one class, counting tokens, counting pairs of neighbours, and the best
# classifier of all would score. Parts are tokens (n, T) and labels (n,) from 0 up.
# ---------------------------------------------------------------------------------------------
def chance(labels):
    """Accuracy of always naming the most frequent class."""
    return float(np.bincount(labels).max() / len(labels))


def unigram_accuracy(tokens, labels, test_tokens, test_labels):
    """Test accuracy of counting tokens: what can be had without looking at order."""
    return naive_bayes(tokens, labels, test_tokens, test_labels)


def bigram_accuracy(tokens, labels, test_tokens, test_labels):
    """Test accuracy of counting pairs of neighbouring tokens.

    On proximity it is near the best possible: the task is easy for whoever looks at neighbours.
    What is hard is to learn that attention should.
    """
    base = max(tokens.max(), test_tokens.max()) + 1
    pairs = base * tokens[:, :-1] + tokens[:, 1:]                     # (n, T - 1)
    test_pairs = base * test_tokens[:, :-1] + test_tokens[:, 1:]
    return naive_bayes(pairs, labels, test_pairs, test_labels)


def naive_bayes(counted, labels, test_counted, test_labels):
    """Test accuracy of naive Bayes on how often each integer occurs in a row of counted (n, m).

    Every integer counts once more than it was seen, so that none is impossible. One that the
    training part does not have says nothing. Memory grows with the integers that occur.
    """
    known = np.unique(counted)
    index = index_in(known, counted)                                  # (n, m)
    test_index = index_in(known, test_counted)
    scores = []
    for k in range(labels.max() + 1):
        of_class = index[labels == k]                                 # (n of the class, m)
        counts = np.bincount(of_class.ravel(), minlength=len(known)) + 1
        log_p = np.append(np.log(counts / counts.sum()), 0.0)         # 0 for what is not known
        log_prior = np.log(len(of_class) / len(labels))
        scores.append(log_prior + log_p[test_index].sum(1))           # (n,)
    predicted = np.argmax(scores, axis=0)                             # (n,)
    return float((predicted == test_labels).mean())


def best_possible_accuracy(name, tokens, labels, vocab_size):
    """Accuracy of the Bayes-optimal classifier on these sequences; None where it is not known.

    With two classes that are equally likely it follows the sign of the log-likelihood ratio. Here
    that is a positive constant, which depends on `signal`, times a difference of counts. A tie
    counts half.
    """
    if name == "proximity":    # steps up minus steps down
        step = np.diff(tokens) % vocab_size                           # (n, T - 1)
        evidence = (step == 1).sum(1) - (step == vocab_size - 1).sum(1)  # (n,)
    elif name == "texture":    # pixels like their upper neighbour minus those like their left one
        side = isqrt(tokens.shape[1])
        image = tokens.reshape(-1, side, side)                        # (n, side, side)
        like_upper = np.diff(image, axis=1) == 0                      # (n, side - 1, side)
        like_left = np.diff(image, axis=2) == 0                       # (n, side, side - 1)
        evidence = like_upper.sum((1, 2)) - like_left.sum((1, 2))     # (n,)
    elif name == "bag":    # symbols of the upper half minus those of the lower half
        evidence = np.where(tokens >= vocab_size // 2, 1, -1).sum(1)  # (n,)
    else:    # nobody knows
        return None
    correct = np.where(evidence == 0, 0.5, (evidence > 0) == labels)  # (n,)
    return float(correct.mean())


def unigram_entropy(tokens, vocab_size):
    """Entropy, in nats, of how often each of the V symbols occurs; the mask symbol is left out.

    It is the masked loss of a model that knows only how frequent each symbol is.
    """
    counts = np.bincount(tokens.ravel(), minlength=vocab_size)[:vocab_size]
    p = counts[counts > 0] / counts[:vocab_size].sum()
    return float(-(p * np.log(p)).sum())
