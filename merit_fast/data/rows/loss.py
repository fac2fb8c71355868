"""Decides which messages of a conversation are in the loss."""

from merit_fast.data.config import DataConfig, DatasetConfig, TrainOn
from merit_fast.data.conversation import Conversation


def train_on_of(config: DatasetConfig, data_config: DataConfig) -> TrainOn:
    """The rule in force for a dataset: its own ``train_on``, else that of `data:`."""
    return data_config.train_on if config.train_on is None else config.train_on


def messages_in_loss(conversation: Conversation, train_on: TrainOn) -> tuple[bool, ...]:
    """Tells of each message whether it is in the loss. A mark of the row itself wins.

    Args:
        conversation: the row; ``Message.in_loss`` is its own mark.
        train_on: "all" for every message of the assistant, "last" for its last one, or the roles
            whose messages are in the loss.
    """
    messages = conversation.messages
    if train_on == "last":
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        chosen = {answers[-1]} if answers else set()
        by_rule = [i in chosen for i in range(len(messages))]
    else:
        roles = ("assistant",) if train_on == "all" else train_on
        by_rule = [message.role in roles for message in messages]
    return tuple(
        rule if message.in_loss is None else message.in_loss
        for rule, message in zip(by_rule, messages, strict=True)
    )
