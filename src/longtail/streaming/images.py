"""Images that lie in files, where the engine expects a tensor of them: read by workers before it asks.

The engine takes an epoch's images from `split.images[rows]`, and a look at a split from `split.images[first:last]`.
Both can be foreseen, for an epoch's rows follow from seed and epoch alone: `Images` has what comes next decoded, and
hands it over when its turn comes. What is drawn of an image, its random part, follows from seed, epoch and the
image's place in the epoch, so that a training that is taken up at any step, or shared by any number of processes, sees
the same.

N images, n of them, R pixels a side.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longtail.data import batches
from longtail.data.large import feed
from longtail.data.large.pixels import CHANNELS, Square, Window
from longtail.data.large.store import Piece
from longtail.losses import BaseLoss

PART = 32  # images that a worker decodes at a time
DRAWS = 3  # the stream of random numbers, beside batches' ORDER, AUGMENT and MIX


class Request(NamedTuple):
    """Rows (n,) of a split that will be asked for together, and where their draws come from."""

    rows: Tensor
    seeds: list[tuple[int, ...]] = []  # noqa: RUF012  of a NamedTuple: nobody changes it


class Ahead:
    """Requests that are known before they come, read by the workers one after another."""

    def __init__(
        self, reader: feed.Reader, pieces: list[Piece], how: Square | Window, requests: Iterable[Request],
        device: torch.device,
    ):  # fmt: skip
        self.reader, self.pieces, self.how, self.device = reader, pieces, how, device
        self.begun = deque[Tensor]()  # rows of those that the workers have been given
        self.chunks = reader.read(self._parts(requests))
        self.number = 0  # the reader's, of this reading

    def take(self, rows: Tensor) -> Tensor:
        """The pixels (n, 3, R, R) uint8 of the next request, which must be this one.

        Raises ValueError for another, for a file that is no image, and as `feed.Reader.read`.
        """
        side, at = self.how.side, 0
        pixels = torch.empty((len(rows), CHANNELS, side, side), dtype=torch.uint8, device=self.device)
        while at < len(rows):
            chunk = next(self.chunks, None)
            self.number = self.number or self.reader.reading
            if chunk is None or (at == 0 and not _same(self.begun.popleft(), rows)):
                raise ValueError("images were asked for in another order than was foreseen")
            if chunk.broken:
                place, why = next(iter(chunk.broken.items()))
                piece = self.pieces[int(rows[at + place])]
                raise ValueError(f"{piece.file} at {piece.offset}: {why}, though it was an image once")
            count = len(chunk.values)
            pixels[at : at + count].copy_(chunk.values, non_blocking=True)
            at += count
        return pixels

    @property
    def over(self) -> bool:
        """Whether another reading has taken the workers."""
        return self.number not in (0, self.reader.reading)

    def _parts(self, requests: Iterable[Request]) -> Iterator[feed.Wanted]:
        for rows, seeds in requests:
            if len(rows):
                self.begun.append(rows)
            for at in range(0, len(rows), PART):
                part = [self.pieces[row] for row in rows[at : at + PART].tolist()]
                yield feed.Wanted(part, self.how, seeds[at : at + PART])


def _same(known: Tensor, asked: Tensor) -> bool:
    """Whether these are the rows that are asked for; on a GPU their number alone is looked at: it waits for nothing."""
    return len(known) == len(asked) and (asked.device.type != "cpu" or torch.equal(known, asked))


class Images:
    """Images (N, 3, R, R) uint8 of a split, as far as the engine asks a tensor for them.

    Args:
        reader: of the store that has them.
        pieces: where each is.
        square: how they are shown where nothing is drawn.
        device: where pixels go.
    """

    dtype = torch.uint8

    def __init__(self, reader: feed.Reader, pieces: list[Piece], square: Square, device: torch.device):
        self.reader, self.pieces, self.square, self.device = reader, pieces, square, device
        self.shape = torch.Size((len(pieces), CHANNELS, square.side, square.side))
        self.epoch: Ahead | None = None
        self.look: tuple[int, Ahead] | None = None  # and the row that is next

    def __len__(self) -> int:
        return len(self.pieces)

    def of(self, rows: np.ndarray) -> "Images":
        """Those rows (n,), as images of their own."""
        return Images(self.reader, [self.pieces[row] for row in rows], self.square, self.device)

    def __getitem__(self, rows: Any) -> Any:
        """Pixels (n, 3, R, R) of rows (n,), the next of the epoch, or of a slice, the next of a look.

        A slice without an end is a view: what a process has of a look that several share.
        """
        if isinstance(rows, slice):
            if rows.stop is None:
                return Images(self.reader, self.pieces[rows], self.square, self.device)
            return self._of_look(rows)
        if self.epoch is None:
            raise ValueError("images were asked for before their epoch began")
        return self.epoch.take(rows)

    def begin(self, how: Square | Window, requests: Iterable[Request]) -> None:
        """Say what the epoch that begins, or is taken up, is going to ask for."""
        self.epoch = Ahead(self.reader, self.pieces, how, requests, self.device)

    def _of_look(self, rows: slice) -> Tensor:
        first, last, _ = rows.indices(len(self))
        if self.look is None or self.look[0] != first or self.look[1].over:
            size = rows.stop - first
            slices = (Request(torch.arange(at, min(at + size, len(self)))) for at in range(first, len(self), size))
            self.look = first, Ahead(self.reader, self.pieces, self.square, slices, self.device)
        reading = self.look[1]
        self.look = (last, reading) if last < len(self) else None
        return reading.take(torch.arange(first, last))


def requests(
    split: batches.Split, *, epoch: int, seed: int, batch_size: int, drop_last: bool, class_balanced: bool,
    mixup_alpha: float, cutmix_alpha: float, start_batch: int, rank: int, world: int,
) -> Iterator[Request]:  # fmt: skip
    """What `batches.epoch`, with these arguments, is going to ask `split.images` for."""
    count = batches.batches_per_epoch(len(split), batch_size=batch_size, drop_last=drop_last)
    order = batches.draw_order(
        split, class_balanced=class_balanced, generator=batches.torch_generator(seed, batches.ORDER, epoch)
    )[: count * batch_size]
    height, width = split.images.shape[2:]
    per_chunk = max(1, batches.CHUNK_PIXELS // (batch_size * height * width))
    for chunk in range(start_batch // per_chunk, -(-count // per_chunk)):
        wanted = []
        for number in range(max(start_batch, chunk * per_chunk), min((chunk + 1) * per_chunk, count)):
            joint = torch.arange(number * batch_size, min((number + 1) * batch_size, len(order)))
            mixing = batches.draw_mixing(
                len(joint), height=height, width=width, mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha,
                generator=batches.batch_generator(seed, epoch, number),
            )  # fmt: skip
            wanted += [joint[rank::world], joint[mixing.partner][rank::world]]
        if not wanted:  # the epoch was taken up after its last batch
            return
        places = torch.unique(torch.cat(wanted))
        yield Request(order[places], [(seed, DRAWS, epoch, place) for place in places.tolist()])


class Foreseen(BaseLoss):
    """A loss that says at which batch of which epoch the training is: the engine tells the loss, and nobody else.

    Args:
        loss: what is minimised.
        begin: called with epoch (from 1) and batch (from 0) where an epoch begins or is taken up.
    """

    at: Tensor

    def __init__(self, loss: BaseLoss, begin: Callable[[int, int], None]):
        super().__init__()
        self.loss = loss
        self.scale, self.experts = loss.scale, loss.experts
        self.class_balanced_sampling, self.remembers = loss.class_balanced_sampling, loss.remembers
        self.__dict__["begin"] = begin
        self.register_buffer("at", torch.zeros(2, dtype=torch.int64))  # of the checkpoint, on the CPU

    def forward(self, logits_EBC: Tensor, labels_B: Tensor, weight: float = 1.0, *places_B: Tensor) -> Tensor:
        """That of the loss."""
        value: Tensor = self.loss(logits_EBC, labels_B, weight, *places_B)
        return value

    def remember(self, logits_EBC: Tensor, labels_B: Tensor, places_B: Tensor) -> None:
        """That of the loss."""
        self.loss.remember(logits_EBC, labels_B, places_B)

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """That of the loss; the epoch's images are asked for next."""
        if int(self.at[0]) != epoch:  # else it is taken up
            self.at[0], self.at[1] = epoch, 0
        self.__dict__["begin"](epoch, int(self.at[1]))
        self.loss.start_epoch(epoch, epochs)

    def after_step(self) -> None:
        """That of the loss."""
        self.at[1] += 1
        self.loss.after_step()


def as_window(square: Square, window: Mapping[str, Any] | None) -> Square | Window:
    """How training shows images: a recipe's random parts, or as they are shown where nothing is drawn."""
    if window is None:
        return square
    scale, ratio = ((float(low), float(high)) for low, high in (window["scale"], window["ratio"]))
    return Window(square.side, scale, ratio, square.exif_orientation, square.draft)
