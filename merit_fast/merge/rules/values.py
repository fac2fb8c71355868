"""The parameters of a merge, looked up tensor by tensor."""

from collections.abc import Mapping, Sequence

from merit_fast.errors import InputError
from merit_fast.merge.parameters import Layers, ModelSettings, Setting, setting_at
from merit_fast.records import record

Coefficients = tuple[float, ...]


@record
class MethodValues:
    """All parameters of one merge.

    ``weights`` are the shared ones, already normalised; ``models`` holds each model's own settings,
    or nothing.
    """

    settings: Mapping[str, Setting | None]
    weights: Coefficients
    models: Sequence[ModelSettings]
    layers: Layers
    normalize: bool
    seed: int
    count: int  # of models
    rescale: bool | None = None  # None: as the method does it

    @property
    def are_uniform(self) -> bool:
        """Whether no parameter differs between tensors."""
        numbers = (int, float, type(None))
        return not self.models and all(isinstance(v, numbers) for v in self.settings.values())

    def at(
        self, name: str, shape: tuple[int, ...] = (), num_elements: int = 0, from_base: bool = False
    ) -> "TensorValues":
        """Parameters of one tensor."""
        return TensorValues(self, name, shape, num_elements, from_base)


@record(many=True)
class TensorValues:
    """Parameters of one tensor of K models. ``from_base``: the method sees deltas from a base."""

    shared: MethodValues
    name: str
    shape: tuple[int, ...]
    num_elements: int
    from_base: bool

    @property
    def count(self) -> int:
        """The number of models, K."""
        return self.shared.count

    @property
    def normalize(self) -> bool:
        """Whether weights are divided by their sum."""
        return self.shared.normalize

    @property
    def rescale(self) -> bool | None:
        """Whether kept deltas are enlarged for those dropped; None: as the method does it."""
        return self.shared.rescale

    @property
    def seed(self) -> int:
        """Seed of the random choices."""
        return self.shared.seed

    def of(self, key: str, model: int | None = None) -> float:
        """One parameter. Filters see the name that ``model`` has for the tensor, else the output's.

        Raises:
            InputError: no case of the parameter matches the tensor.
        """
        value = setting_at(self.shared.settings[key], self.name, self.shared.layers, model)
        if value is None:
            raise InputError(f"merge: {self.name}: {key} has no case that matches this tensor")
        return value

    def by_model(self, key: str) -> tuple[float, ...]:
        """[K] one parameter: each model's setting, else the shared one."""
        settings = [getattr(model, key) for model in self.shared.models] or [None] * self.count
        values = [
            setting_at(setting, self.name, self.shared.layers, k)
            for k, setting in enumerate(settings)
        ]
        return tuple(self.of(key) if value is None else value for value in values)

    def weights(self) -> Coefficients:
        """[K] the weights, normalised tensor by tensor where models have weights of their own.

        Raises:
            InputError: a weight has no case that matches the tensor, or the weights sum to 0.
        """
        settings = [model.weight for model in self.shared.models]
        if all(setting is None for setting in settings):
            return self.shared.weights
        weights: list[float] = []
        for k, setting in enumerate(settings):
            weight = setting_at(setting, self.name, self.shared.layers, k)
            if weight is None:
                raise InputError(
                    f"merge: {self.name}: models[{k}].weight has no case that matches this tensor"
                )
            weights.append(weight)
        total = sum(weights) if self.normalize else 1.0
        if abs(total) <= 1e-12:
            raise InputError(
                f"merge: {self.name}: weights must have a sum other than 0, got {weights}"
            )
        return tuple(weight / total for weight in weights)
