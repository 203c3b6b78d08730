"""Publish a run or a model on the Hub: `python scripts/push_to_hub.py runs/mine org/moco-v2-r50`."""

import sys
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from ...cli import build_parser, how_to_run, parse_flags
from ...errors import one_line_errors
from ...evaluation.encoder import check_exists
from ...hub.origin import describe_shown, read_origin, usual_license
from ...hub.publish import CARD, PublishArguments, check_formats, list_files, load_published, make_folder, publish
from ...hub.repository import Repository
from ...process import command


@command
def main(argv: list[str]) -> None:
    disable_progress_bar()  # transformers' bars for loading and saving weights
    parser = build_parser(
        [PublishArguments],
        usage=f"{how_to_run('publish')} RUN_OR_MODEL ORG/NAME [--flag value ...]",
        description="Publish a run or a model in one commit, in formats that transformers and timm load by one name.",
    )
    parser.add_argument(
        "source", help="Folder that a run or a probe saved to, one of its checkpoints, or a MoCo model."
    )
    parser.add_argument("repository", help="Name on the Hub; it is made if it is not there.")
    with one_line_errors():
        names, (args,), _ = parse_flags(parser, {"publish": PublishArguments}, argv, {})
        repository = Repository(names.repository, args.private, revision=args.revision)
        check_exists(names.source)
        model, processor = load_published(names.source, args.include_training_state)
        check_formats(model, args)
        if not args.dry_run:
            repository = repository.check()
        with make_folder() as name:
            folder = Path(name)
            publish(names.source, model, processor, repository.name, args, folder)
            show_files(folder)
            origin = read_origin(Path(names.source), model)
            print("\n".join(describe_shown(origin, model, args.include_pictures)))
            if args.license is None:
                usual = usual_license(origin)
                reason = ", for the weights may have begun with those of others" * (usual == "unknown")
                print(f"The licence is {usual}{reason}: --license names another")
            if args.dry_run:
                print(f"\n{(folder / CARD).read_text(encoding='utf-8')}\nNothing was uploaded (--dry_run).")
                return
            repository.check_card((folder / CARD).read_text(encoding="utf-8"))
            address = repository.prepare().upload(folder, "Publish a MoCo model")
    print(f"Published: {address}")


def show_files(folder: Path) -> None:
    sizes = {name: (folder / name).stat().st_size for name in list_files(folder)}
    width = max(map(len, sizes))
    for name, size in sizes.items():
        print(f"{name:<{width}}  {size / 1e6:10,.3f} MB")
    print(f"{'in all':<{width}}  {sum(sizes.values()) / 1e6:10,.3f} MB")


if __name__ == "__main__":
    main(sys.argv[1:])
