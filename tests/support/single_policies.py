"""Every policy of one view that is known, under the name of its augmentation and, of a pair, of its view."""

from training.views.policy import POLICIES, ViewPolicy, build_policies


def single_policies() -> dict[str, ViewPolicy]:
    """Each different policy once."""
    found: dict[ViewPolicy, str] = {}
    for name, policy in POLICIES.items():
        query, key = build_policies(name)
        found.setdefault(query, name if isinstance(policy, ViewPolicy) else f"{name}, query")
        found.setdefault(key, f"{name}, key")
    return {name: policy for policy, name in found.items()}
