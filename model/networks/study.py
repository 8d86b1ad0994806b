"""The seven levels of a patient seen together."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.networks.fracture import AdditiveAttention


class StudyAnswer(NamedTuple):
    """logits: of "fractured" for each level, `(B, 7)`. patient: of "any of them", `(B,)`."""

    logits: Tensor
    patient: Tensor


class StudyNet(nn.Module):
    """BiGRU over the levels C1..C7: corrects each level by its neighbours, and speaks for the patient.

    Fractures cluster in neighbours, and what a vertebra looks like is judged against the others of the same neck. The
    network answers with what the fracture network said plus a correction that training finds; untrained there is
    none, and the patient is as likely fractured as the likeliest level.
    """

    def __init__(self, num_features: int, num_hidden: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(num_features)
        self.missing = nn.Parameter(torch.zeros(num_features + 1))
        self.gru = nn.GRU(num_features + 1, num_hidden, batch_first=True, bidirectional=True)
        self.attention = AdditiveAttention(2 * num_hidden, num_hidden)
        self.level_head = nn.Linear(2 * num_hidden, 1)
        self.patient_head = nn.Linear(2 * num_hidden, 1)
        for head in (self.level_head, self.patient_head):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, contexts: Tensor, logits: Tensor, present: Tensor) -> StudyAnswer:
        """Corrected answers.

        contexts: `(B, 7, F)`, and logits: `(B, 7)`, as `FractureNet` gives them. present: bool `(B, 7)`, at least one
        in each row; what the others hold is not looked at, and their answers mean nothing.
        """
        seen = torch.cat([self.norm(contexts), logits[..., None]], dim=2)
        hidden, _ = self.gru(torch.where(present[..., None], seen, self.missing))
        logits = logits + self.level_head(hidden).squeeze(2)
        pooled, _ = self.attention(hidden, present)
        likeliest = logits.masked_fill(~present, -torch.inf).amax(dim=1)
        return StudyAnswer(logits, likeliest + self.patient_head(pooled).squeeze(1))
