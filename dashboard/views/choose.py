"""Choose: which network, which images."""

from __future__ import annotations

import base64

import streamlit as st

from core.errors import LimberError
from core.records import DataOutline, Preprocessing, SampleImage
from dashboard import charts, frame, plot, store, words
from dashboard.parts import uploading

SHOWN_IMAGES = 8
IMAGE_PX = 104
BAR_PX = 26
INTENSITIES_PX = 240


def page() -> None:
    """Draw the page."""
    space = store.current()
    st.subheader("Which network, and which images?")
    with st.spinner("Starting", show_time=True):
        store.model_entries()
        store.dataset_entries()
    left, right = st.columns(2, gap="large")
    with left:
        st.markdown("#### Network")
        _network(space)
    with right:
        st.markdown("#### Images")
        _images(space)
    st.markdown("#### What the network sees")
    _preview(space)


def _network(space: store.Workspace) -> None:
    way = st.segmented_control(
        "Where the network comes from",
        ("Embedded", "timm, torchvision", "Your checkpoint"),
        default="Embedded",
        required=True,
        key="model_way",
        wrap=True,
        label_visibility="collapsed",
    )
    if way == "Embedded":
        _embedded_models(space)
    elif way == "Your checkpoint":
        _checkpoint(space)
    else:
        _named_model(space)


def _images(space: store.Workspace) -> None:
    way = st.segmented_control(
        "Where the images come from",
        ("Embedded", "Folder, zip", "Upload", "torchvision"),
        default="Embedded",
        required=True,
        key="data_way",
        wrap=True,
        label_visibility="collapsed",
    )
    if way == "Embedded":
        _embedded_data(space)
    elif way == "Folder, zip":
        _folder(space)
    elif way == "Upload":
        _upload(space)
    else:
        _torchvision_set(space)


def _card(title: str, lines: list[str], *, chosen: bool, key: str) -> bool:
    with st.container(border=True, key=f"card_{key}", height="stretch", gap="small"):
        st.markdown(f"**{words.escape(title)}**")
        # Two spaces and a line break keep the lines in one paragraph.
        st.caption("  \n".join(words.escape(line) for line in [*lines, words.NO_DOWNLOAD]))
        return st.button(
            "Chosen" if chosen else "Use",
            key=f"use_{key}",
            disabled=chosen,
            icon=":material/check:" if chosen else None,
        )


def _embedded_models(space: store.Workspace) -> None:
    choice = space.choice
    entries = [entry for entry in store.model_entries() if entry.embedded]
    for column, entry in zip(st.columns(max(2, len(entries))), entries, strict=False):
        with column:
            chosen = (choice.model, choice.weights, choice.checkpoint) == (
                entry.name,
                "pretrained",
                None,
            )
            size = f"{words.short(entry.parameters)} parameters" if entry.parameters else ""
            facts = ", ".join(part for part in (entry.kind, size) if part)
            if _card(
                entry.title,
                [facts, f"Licence {entry.licence}"],
                chosen=chosen,
                key=f"model_{entry.name}",
            ):
                _use_model(space, model=entry.name, weights="pretrained", checkpoint=None)


def _named_model(space: store.Workspace) -> None:
    entries = {entry.name: entry for entry in store.model_entries() if not entry.embedded}

    def label(name: str) -> str:
        count = entries[name].parameters if name in entries else None
        return f"{name}  ({words.short(count)})" if count else name

    with st.container(border=True):
        name = st.selectbox(
            "Name",
            list(entries),
            index=None,
            format_func=label,
            key="model_name",
            placeholder=f"Search {len(entries):,} names, e.g. resnet18",
            help="Names of timm first, then of torchvision. Weights are downloaded once.",
        )
        with st.container(horizontal=True, vertical_alignment="bottom"):
            random = st.toggle(
                "Random weights",
                key="model_random",
                help="The architecture's own initialisation, nothing learnt. Works offline.",
            )
            if st.button("Use this network", key="use_named", disabled=name is None) and name:
                _use_model(
                    space, model=name, weights="none" if random else "pretrained", checkpoint=None
                )
        if space.choice.model in entries:
            st.text(words.clean(f"Chosen: {space.choice.model}, {space.choice.weights} weights"))


def _checkpoint(space: store.Workspace) -> None:
    with st.container(border=True):
        name = st.text_input(
            "Architecture",
            key="checkpoint_model",
            placeholder="resnet18, timm:vit_tiny_patch16_224, ...",
            help="The network's name in timm or torchvision.",
        )
        path = st.text_input(
            "Path of the checkpoint on this machine",
            key="checkpoint_path",
            placeholder="weights.safetensors or a state dict (.pth)",
        )
        file = uploading.field(
            "checkpoint",
            "or upload it",
            endings=("safetensors", "pth", "pt", "bin"),
            help_text="A state dict is read with weights_only: no code is run.",
        )
        if st.button(
            # Never greyed out: a field tells what it holds when it is left, which the click on a
            # grey button would only do.
            "Use this checkpoint",
            key="use_checkpoint",
        ):
            if not name or not (path or file):
                st.error("Name the architecture, and give the checkpoint's path or upload it.")
                return
            network = {"model": name.strip(), "weights": "pretrained"}
            if file:
                uploading.take(
                    space,
                    "checkpoint",
                    file,
                    lambda path: _try_model(space, **network, checkpoint=path),
                )
            else:
                _use_model(space, **network, checkpoint=path.strip())
        if space.choice.checkpoint:
            st.text(
                words.clean(
                    f"Chosen: {space.choice.model} from {frame.file_name(space.choice.checkpoint)}"
                )
            )


def _use_model(space: store.Workspace, **changes: str | None) -> None:
    refused = _try_model(space, **changes)
    if refused is None:
        st.rerun()
    st.error(words.escape(refused))


def _try_model(space: store.Workspace, **changes: str | None) -> str | None:
    """Load the network, then choose it. If it cannot be loaded, return why and choose nothing."""
    try:
        if changes["checkpoint"] is not None:
            changes["checkpoint"] = store.permitted_path(changes["checkpoint"])
        trial = space.choice.model_copy(update=changes)
        own = trial.checkpoint is not None
        with st.spinner(words.OPENING if own else "Loading the network", show_time=own):
            store.model_outline(trial, again=True)
    except LimberError as error:
        return words.sentence(error)
    space.choose(**changes)
    return None


def _embedded_data(space: store.Workspace) -> None:
    entries = [entry for entry in store.dataset_entries() if entry.embedded]
    for column, entry in zip(st.columns(max(2, len(entries))), entries, strict=False):
        with column:
            facts = []
            if entry.images is not None and entry.classes is not None:
                facts.append(
                    f"{words.count(entry.images, 'image')}, "
                    f"{words.count(entry.classes, 'class', 'classes')}"
                )
            if entry.licence:
                facts.append(f"Licence {entry.licence}")
            if _card(
                entry.title,
                [entry.description, *facts],
                chosen=space.choice.data == entry.name,
                key=f"data_{entry.name}",
            ):
                _use_data(space, entry.name)


def _folder(space: store.Workspace) -> None:
    with st.container(border=True):
        path = st.text_input(
            "Path on this machine",
            key="data_path",
            placeholder="a folder, a zip, or a MedMNIST .npz",
            help="One folder per class, with its images in it. If they lie in folders named train "
            "and val, those are the splits.",
        )
        if st.button("Use these images", key="use_folder"):
            if path.strip():
                _use_data(space, path.strip())
            else:
                st.error("Give the path of a folder, a zip or an npz first.")


def _upload(space: store.Workspace) -> None:
    with st.container(border=True):
        file = uploading.field("data", "A zip with one folder per class", endings=("zip",))
        if st.button("Use these images", key="use_upload", disabled=file is None) and file:
            uploading.take(space, "data", file, lambda path: _try_data(space, path))
        if store.is_upload(space, space.choice.data):
            st.text(words.clean(f"Chosen: {frame.file_name(space.choice.data)}"))


def _torchvision_set(space: store.Workspace) -> None:
    names = [
        entry.name.removeprefix("torchvision:")
        for entry in store.dataset_entries()
        if not entry.embedded
    ]
    with st.container(border=True):
        name = st.selectbox(
            "Data set",
            names,
            index=None,
            key="data_set",
            accept_new_options=True,
            placeholder="CIFAR10, FashionMNIST, ...",
        )
        root = st.text_input(
            "Folder that holds it",
            key="data_root",
            help="What torchvision calls root. Nothing is downloaded.",
        )
        if st.button("Use these images", key="use_set"):
            if name and root.strip():
                _use_data(space, f"torchvision:{name}:{root.strip()}")
            else:
                st.error("Choose a data set, and give the folder that holds it.")


def _use_data(space: store.Workspace, name: str) -> None:
    refused = _try_data(space, name)
    if refused is None:
        st.rerun()
    st.error(words.escape(refused))


def _try_data(space: store.Workspace, name: str) -> str | None:
    """Look at the images, then choose them. If that fails, return why and choose nothing."""
    own = name not in {entry.name for entry in store.dataset_entries() if entry.embedded}
    try:
        name = store.permitted_data(name)
        trial = space.choice.model_copy(update={"data": name})
        with st.spinner(words.OPENING if own else "Looking at the images", show_time=own):
            if own:
                store.look_at_data(trial, _preprocessing(space), SHOWN_IMAGES)
            else:
                store.data_outline(trial)
    except LimberError as error:
        return words.sentence(error)
    space.choose(data=name)
    return None


def _preprocessing(space: store.Workspace) -> Preprocessing:
    """Return how the present network sees images, which the number of classes does not change."""
    outline = store.model_outline(space.choice)
    size = space.measure_options.image_size or outline.default_size
    return outline.preprocessing.model_copy(update={"image_size": size})


def _inline(png: bytes) -> str:
    # As a file, Streamlit would make a JPEG of it, and drop it as soon as the page moves on, even
    # before the browser has asked for it.
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _picture(image: SampleImage) -> None:
    with st.container(width=IMAGE_PX, gap="small"):
        width, height = image.original_size
        st.image(
            _inline(image.original_png),
            width=IMAGE_PX,
            alt=words.clean(f"{image.label}, as stored, {width} by {height} pixels"),
        )
        st.image(
            _inline(image.input_png),
            width=IMAGE_PX,
            alt=words.clean(f"{image.label}, after preprocessing"),
        )
        st.caption(words.escape(image.label))


def _bars(data: DataOutline) -> None:
    """Draw how many images each class has, and the intensities of deep images."""
    st.markdown("**Images in each class**")
    bars = len(data.classes) * max(1, len(data.counts))
    height = min(560, 90 + BAR_PX * bars // 2 + BAR_PX * len(data.classes) // 2)
    plot.plot(
        charts.class_bars(data, dark=frame.is_dark()),
        key="class_bars",
        height=height,
        alt=f"Bar chart of images in each of {len(data.classes)} classes",
    )
    for intensities in data.intensities:
        st.markdown("**Intensities**")
        st.text(words.clean(intensities.sentence))
        plot.plot(
            charts.intensity_bars(intensities, dark=frame.is_dark()),
            key=f"intensities_{intensities.kind}",
            height=INTENSITIES_PX,
            alt=words.intensities_alt(intensities),
        )


def _preview(space: store.Workspace) -> None:
    choice = space.choice
    with st.spinner("Loading the network and the images", show_time=True):
        data = store.data_outline(choice)
        outline = store.model_outline(choice)
        preprocessing = _preprocessing(space)
        shown = store.images(choice, preprocessing, SHOWN_IMAGES)
    for caveat in data.caveats:
        st.warning(words.escape(caveat))
    st.caption("Top: as stored. Bottom: as the network sees it.")
    with st.container(horizontal=True, gap="small"):
        for image in shown:
            _picture(image)
    left, right = st.columns([3, 2], gap="large")
    with left:
        _bars(data)
    with right:
        st.markdown("**Preprocessing**")
        st.write(words.escape(words.preprocessing_sentence(preprocessing)))
        st.markdown("**Head**")
        st.text(words.clean(words.head_sentence(outline)))
        # What the outline says of the head stands above in more words.
        loading = (note.sentence for note in outline.notes if note.about != "head")
        notes = [*loading, *data.notes]
        drawn = {intensities.sentence for intensities in data.intensities}
        notes = [note for note in notes if note not in drawn]
        if notes:
            st.markdown("**Also**")
            for note in notes:
                st.text(words.clean(note))
        if data.citation:
            with st.expander("Source of the images"):
                st.text(words.clean(data.citation))
    frame.link("look", "Next: look where it is stiff")


page()
