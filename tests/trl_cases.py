"""Trainers on tiny models: a tokenizer of words, arguments of one SGD step, and the same step in a plain loop."""

import contextlib
import copy
import warnings

import datasets
import tiny_models as tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gradroute import MLPSites
from gradroute.models import RouteCollator, RoutingPlan, route
from gradroute.tables import localize

LEARNING_RATE = 0.1

# One step of the gradient times the learning rate, and nothing besides.
STEP = {
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "learning_rate": LEARNING_RATE,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "train_sampling_strategy": "sequential",
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
}

# The tokens of words w0, w1, ... follow those of the template; every assistant turn ends with <eos>.
WORDS = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "user": 3, "assistant": 4}
EOS = WORDS["<eos>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} "
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }} <eos> {% endgeneration %}"
    "{% else %}{{ message['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def tokenizer():
    vocabulary = WORDS | {f"w{i}": len(WORDS) + i for i in range(tiny.VOCABULARY - len(WORDS))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        chat_template=CHAT_TEMPLATE,
    )


def text(ids):
    """Words whose tokens are `ids`."""
    return " ".join(f"w{i - len(WORDS)}" for i in ids)


def ids(n, start):
    """n tokens of words, another sequence for every start."""
    words = tiny.VOCABULARY - len(WORDS)
    return [len(WORDS) + (5 * start + 3 * t) % words for t in range(n)]


def dataset(rows):
    datasets.disable_progress_bars()
    return datasets.Dataset.from_list(rows)


def hidden_plan():
    hidden = localize(2, tiny.D_FF, {1: slice(16, 24)})
    return RoutingPlan(2, mlp=MLPSites(hidden=hidden, update=hidden))


def forward_plan():
    """Retain tokens do not see what forget tokens train."""
    seen = localize(2, tiny.D_FF, {0: slice(16, 24)}, on=0.0, off=1.0)
    return RoutingPlan(2, mlp=MLPSites(forward=seen, update=localize(2, tiny.D_FF, {1: slice(16, 24)})))


def routed(plan=None):
    return route(tiny.llama(), plan or hidden_plan())


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def stepped(model, loss_of):
    """The weights of a copy of the model after a step of SGD on `loss_of(copy)`."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    loss_of(model).backward()
    optimizer.step()
    return weights(model)


def stepped_on(model, examples, **options):
    """The weights after a step on one batch of examples, collated by RouteCollator."""
    batch = RouteCollator(pad_token_id=0, **options)(examples)
    return stepped(model, lambda copy: copy(**batch).loss)


def assert_close(got, expected):
    """The same weights, to fp32 rounding of a gradient times the learning rate (largest weight about 1)."""
    far = {name: (got[name] - value).abs().max().item() for name, value in expected.items()}
    assert max(far.values()) < 1e-6, far


def assert_routed(got, plain):
    """Weights other than without routes."""
    assert any((got[name] - plain[name]).abs().max() > 1e-4 for name in got)


@contextlib.contextmanager
def deprecations():
    """Without the warnings of trl and transformers about what they will take away, which their own code uses."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def trained(trainer):
    """The weights after the trainer's steps."""
    with deprecations():
        trainer.train()
    return weights(trainer.model)
