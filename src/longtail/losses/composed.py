"""BalPoE's experts that teach each other at one common prior, with four additions of others: ours, docs/composed.md.

Expert e is trained as in BalPoE (longtail.losses.balpoe): cross-entropy of z_e + tau_e log prior. So its bare logits
z_e are those of a class prior proportional to prior ** (1 - tau_e), another one for each expert: what one expert says
cannot be held against what another says. Moved to one common prior, it can:

    u_e = z_e + (tau_e - 1 + teach_at) log prior            0: the uniform prior, 1: that of the training images

and experts keep different biases while they learn from each other. Added to the mean over experts of the cross-entropy:

    teach * mean over t != e of [t is right] T^2 KL(softmax(u_t / T) || softmax(u_e / T))         t is not moved by it

(mutual distillation: Zhang et al., CVPR 2018; only experts that are right teach: TCL, CVPR 2026, and MDCS, ICCV 2023).

    focus      class y's part of all this weighs (1 - a_y) ** focus, where a_y is the accuracy on its training images of
               late; weights average to one over training images. TCL has 0.5
    consensus  consensus * mean over e of (u_ej - mean of u_ek over k other than j and the label), of an image that all
               experts take for the same wrong class j. After TCL, whose formula is not public: this one is ours
    margin     the angle of the image to its own class is made larger by margin (n_smallest / n_y) ** margin_power
               radians, and of one that the expert has wrong by up to twice that: times 1 + (1 - cos) / 2. A cosine
               head's; DBM (Son et al., AAAI 2025, arXiv:2412.15477), whose difficulty moves nothing here
    recall     recall * mean over e of [r is right] T^2 KL(softmax(r / T) || softmax(u_e / T)), where r is the mean over
               experts of u that the image had in the last epoch that showed it. Self-distillation from the epoch
               before (PS-KD: Kim et al., ICCV 2021), which there is every image's, not only those that were right
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from longtail.losses import BaseLoss
from longtail.losses.balpoe import biases
from longtail.workflow import processes
from longtail.workflow.ranges import Biases, NotNegative, Positive

RATE = 1 / 50  # an image's part in its class's accuracy of late: that of its last fifty or so
FLATTEST = 1e-6  # least squared sine of an angle: the root's slope is infinite at 0


class Loss(BaseLoss):
    """BalPoE with additions; without them (teach = focus = consensus = margin = recall = 0) it is BalPoE.

    Args:
        class_counts_C: training images of each class, all > 0.
        taus: the bias of each expert, as BalPoE's; there are as many experts.
        teach: weight of mutual distillation; without effect for one expert.
        teach_at: the common prior's power of the training prior.
        temperature: T.
        only_right: whether experts that are wrong about an image are silent about it.
        focus: how much more classes weigh that are learnt less well.
        consensus: weight of what all experts agree on and have wrong.
        margin: angle, in radians, of the smallest class.
        margin_power: how fast it falls with the images of a class.
        recall: weight of what was said of the image an epoch ago; it takes N x C numbers of memory, four times
            at the end of an epoch and twice between.

    Raises ValueError for a consensus of two classes.
    """

    shift_E1C: Tensor
    common_E1C: Tensor
    prior_C: Tensor
    margin_C: Tensor
    accuracy_C: Tensor
    said_NC: Tensor
    known_N: Tensor
    saying_NC: Tensor
    seen_N: Tensor
    epoch: Tensor

    def __init__(
        self,
        class_counts_C: Tensor,
        *,
        taus: Biases,
        teach: NotNegative,
        teach_at: float,
        temperature: Positive,
        only_right: bool,
        focus: NotNegative,
        consensus: NotNegative,
        margin: NotNegative,
        margin_power: NotNegative,
        recall: NotNegative = 0.0,
    ):
        super().__init__()
        taus = biases(taus)
        self.experts = len(taus)
        if consensus and len(class_counts_C) < 3:
            raise ValueError(f"consensus = {consensus:g} compares wrong classes, of which two classes have one: take 0")
        self.teach, self.teach_at, self.temperature, self.only_right = teach, teach_at, temperature, only_right
        self.focus, self.consensus, self.margin = focus, consensus, margin
        counts_C = class_counts_C.double()
        log_prior_C = (counts_C / counts_C.sum()).log()
        tau_E11 = torch.tensor(taus, dtype=torch.double, device=counts_C.device).view(-1, 1, 1)
        self.register_buffer("shift_E1C", (tau_E11 * log_prior_C).float())
        self.register_buffer("common_E1C", ((tau_E11 - 1 + teach_at) * log_prior_C).float())
        self.register_buffer("prior_C", (counts_C / counts_C.sum()).float())
        self.register_buffer("margin_C", (margin * (counts_C.min() / counts_C) ** margin_power).float())
        self.register_buffer("accuracy_C", torch.zeros_like(self.margin_C))
        # images of the step, and those of them that are right; empty between steps
        self.step_2C = torch.zeros(2, len(counts_C), device=counts_C.device)
        self.recall, self.remembers = recall, recall > 0 or focus > 0
        self.heard: list[tuple[Tensor, Tensor]] = []  # places and what was said of them in the step; empty between
        if recall:
            size, device = (int(counts_C.sum()), len(counts_C)), counts_C.device
            self.register_buffer("said_NC", torch.zeros(size, device=device))  # in an earlier epoch, where known
            self.register_buffer("known_N", torch.zeros(size[0], dtype=torch.bool, device=device))
            self.register_buffer("saying_NC", torch.zeros(size, device=device))  # in this one: a sum, of how many
            self.register_buffer("seen_N", torch.zeros(size[0], device=device))
            self.register_buffer("epoch", torch.zeros((), dtype=torch.int64, device=device))

    def forward(
        self, logits_EBC: Tensor, labels_B: Tensor, weight: float = 1.0, places_B: Tensor | None = None
    ) -> Tensor:
        """Mean over experts and batch, in nats.

        `places_B` are the images' places in the training split, which `recall` looks at in training.

        Raises ValueError when the network has another number of experts than there are taus, for a margin where the
        logits are no cosines times a scale other than 1, and in training for a recall or focus without places: who does
        not say them does not call `remember` either.
        """
        if len(logits_EBC) != self.experts:
            raise ValueError(f"{len(logits_EBC)} experts for {self.experts} taus")
        if self.training and self.remembers and places_B is None:
            what = f"recall = {self.recall:g} and focus = {self.focus:g}"
            raise ValueError(f"{what}: what is not 0 needs places_B, which images they are, and a call of remember")
        shifted_EBC = (self._with_margin(logits_EBC, labels_B) if self.margin else logits_EBC) + self.shift_E1C
        labels_EB = labels_B.expand(self.experts, -1)
        taught = self.teach > 0 and self.experts > 1
        recalled = self.training and self.recall > 0
        if not (taught or self.consensus or self.focus or recalled):  # the mean at once, as BalPoE rounds
            return weight * F.cross_entropy(shifted_EBC.flatten(0, 1), labels_EB.flatten())
        loss_EB = F.cross_entropy(shifted_EBC.flatten(0, 1), labels_EB.flatten(), reduction="none").view_as(labels_EB)
        loss_B, common_EBC = loss_EB.mean(0), logits_EBC + self.common_E1C
        if taught:
            loss_B = loss_B + self.teach * self._taught(common_EBC, labels_B)
        if self.consensus:
            loss_B = loss_B + self.consensus * self._agreed(common_EBC, labels_B)
        if recalled and places_B is not None:
            loss_B = loss_B + self.recall * self._recalled(common_EBC, labels_B, places_B)
        if self.focus:
            loss_B = loss_B * self.class_weights()[labels_B]
        return weight * loss_B.mean()

    def class_weights(self) -> Tensor:
        """What each class weighs (C,), one on average over training images; more than 99 % right counts as 99 %."""
        wrong_C = (1 - self.accuracy_C).clamp(min=0.01) ** self.focus
        return wrong_C / (self.prior_C * wrong_C).sum()

    def _with_margin(self, logits_EBC: Tensor, labels_B: Tensor) -> Tensor:
        if self.scale == 1:
            raise ValueError(f"margin = {self.margin:g} is an angle: it needs a cosine head, whose logits have a scale")
        own_EB1 = labels_B.view(1, -1, 1).expand(self.experts, -1, 1)
        cosine_EB1 = logits_EBC.gather(2, own_EB1) / self.scale
        wrong_EB1 = (logits_EBC + self.shift_E1C).argmax(2, keepdim=True) != own_EB1
        hard_EB1 = 1 + wrong_EB1 * (1 - cosine_EB1.detach()) / 2
        margin_EB1 = self.margin_C[labels_B].view(1, -1, 1) * hard_EB1
        sine_EB1 = (1 - cosine_EB1.square()).clamp(min=FLATTEST).sqrt()
        moved_EB1 = self.scale * (cosine_EB1 * margin_EB1.cos() - sine_EB1 * margin_EB1.sin())
        return logits_EBC.scatter(2, own_EB1, moved_EB1)

    def _taught(self, common_EBC: Tensor, labels_B: Tensor) -> Tensor:
        """What the others teach, of each image (B,): mean over experts and their teachers."""
        said_EBC = F.log_softmax(common_EBC / self.temperature, 2)
        known_EBC = said_EBC.detach()
        right_EB1 = (common_EBC.detach().argmax(2) == labels_B).unsqueeze(2)
        speaks_EB1 = right_EB1.float() if self.only_right else torch.ones_like(right_EB1, dtype=said_EBC.dtype)
        taught_EBC = speaks_EB1 * known_EBC.exp()
        others_EBC = taught_EBC.sum(0) - taught_EBC
        entropy_EB = (taught_EBC * known_EBC).sum(2)
        apart_EB = entropy_EB.sum(0) - entropy_EB - (others_EBC * said_EBC).sum(2)
        return self.temperature**2 * apart_EB.mean(0) / (self.experts - 1)

    def _agreed(self, common_EBC: Tensor, labels_B: Tensor) -> Tensor:
        """How far above other wrong classes the one is that all experts take each image (B,) for; 0 where none is."""
        top_EB = common_EBC.detach().argmax(2)
        agreed_B = (top_EB == top_EB[0]).all(0) & (top_EB[0] != labels_B)
        mean_BC = common_EBC.mean(0)
        own_B = mean_BC.gather(1, labels_B.unsqueeze(1)).squeeze(1)
        top_B = mean_BC.gather(1, top_EB[:1].T).squeeze(1)
        return agreed_B * (top_B - (mean_BC.sum(1) - own_B - top_B) / (mean_BC.shape[1] - 2))

    def _recalled(self, common_EBC: Tensor, labels_B: Tensor, places_B: Tensor) -> Tensor:
        """What was said of each image (B,) an epoch ago, as a teacher: mean over experts, 0 where it was wrong."""
        known_BC = F.log_softmax(self.said_NC[places_B] / self.temperature, 1)
        right_B = self.known_N[places_B] & (known_BC.argmax(1) == labels_B)
        said_EBC = F.log_softmax(common_EBC / self.temperature, 2)
        apart_EB = (known_BC.exp() * (known_BC - said_EBC)).sum(2)
        return right_B * self.temperature**2 * apart_EB.mean(0)

    @torch.no_grad()
    def start_epoch(self, epoch: int, epochs: int) -> None:
        """What the last epoch has said of its images is what is known of them from now on."""
        if not self.recall or epoch == int(self.epoch):  # taken up in the middle of it
            return
        shown_N = self.seen_N > 0
        self.said_NC[shown_N] = self.saying_NC[shown_N] / self.seen_N[shown_N].unsqueeze(1)
        self.known_N |= shown_N
        self.saying_NC.zero_(), self.seen_N.zero_(), self.epoch.fill_(epoch)

    @torch.no_grad()
    def remember(self, logits_EBC: Tensor, labels_B: Tensor, places_B: Tensor) -> None:
        """Which images the product has right; what the experts say of them at the common prior, for the next epoch."""
        if self.focus:
            right_B = (logits_EBC.mean(0).argmax(1) == labels_B).float()
            self.step_2C.index_add_(1, labels_B, torch.stack([torch.ones_like(right_B), right_B]))
        if self.recall:
            self.heard.append((places_B, (logits_EBC + self.common_E1C).mean(0)))

    @torch.no_grad()
    def after_step(self) -> None:
        """Move each class's accuracy towards that of its images in the step; keep what was said of them."""
        if self.heard:
            places_B, common_BC = (processes.rows_of_all(torch.cat(parts)) for parts in zip(*self.heard, strict=True))
            self.saying_NC.index_add_(0, places_B, common_BC)
            self.seen_N.index_add_(0, places_B, torch.ones_like(common_BC[:, 0]))
            self.heard.clear()
        if not self.focus:
            return
        processes.add_up(self.step_2C)
        images_C, right_C = self.step_2C
        kept_C = (1 - RATE) ** images_C
        self.accuracy_C.copy_(kept_C * self.accuracy_C + (1 - kept_C) * right_C / images_C.clamp(min=1e-12))
        self.step_2C.zero_()
