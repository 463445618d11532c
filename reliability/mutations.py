"""Take one protection out at a time, in a copy of the repository, and check that its test then fails.

`MUTATIONS` is the list. A line must occur exactly once in its file, so that an entry that the code has outgrown fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from reliability.goals import Case, Result, spread
from reliability.records import ROOT

CHECK = "a protection taken out: its test fails"


class Mutation(NamedTuple):
    """One protection.

    Attributes:
        name: what protects; names the case.
        file: below `normfree/`.
        line: a part of the file, usually one line; it occurs once.
        replacement: takes the protection out.
        test: the test that fails then; as pytest takes it, below `tests/`.
    """

    name: str
    file: str
    line: str
    replacement: str
    test: str


STOP, DISK, FOLDER = "training/test_stop.py::", "training/test_disk.py::", "training/test_run_folder.py::"
LAWS = "properties/"
MODEL = (
    LAWS
    + "test_model_folder_laws.py::test_any_value_in_a_config_gives_a_model_that_predicts_or_a_value_error"
)
HOSTILE, TORCH, CONFIG = (
    "serve/test_hostile.py::",
    "weights/test_torch_file.py::",
    "training/test_config.py::",
)

MUTATIONS = (
    # signals and processes
    Mutation("SIGHUP and SIGUSR1 are handled", "training/stop.py",
             '"SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")', '"SIGTERM", "SIGINT")',
             STOP + "test_each_signal_saves_after_the_step_and_ends_with_its_exit_code"),
    Mutation("a signal waits for the end of the step", "training/stop.py",
             "        if not self._deferred:\n", "        if True:\n",
             STOP + "test_each_signal_saves_after_the_step_and_ends_with_its_exit_code"),
    Mutation("an ignored signal stays ignored", "training/stop.py",
             "before is signal.SIG_IGN or ", "",
             STOP + "test_signals_that_the_caller_ignores_or_handles_stay_so"),
    Mutation("a signal ends an evaluation", "training/loop.py",
             "    stopped = never if stop is None else stop.requested\n", "    stopped = never\n",
             STOP + "test_a_signal_ends_an_evaluation_which_the_resumed_run_makes_again"),
    Mutation("a process of torchrun notices that its launcher is gone", "training/stop.py",
             "    os.kill(os.getpid(), signal.SIGTERM)\n", "",
             STOP + "test_a_process_of_torchrun_stops_when_its_launcher_is_gone"),
    Mutation("a dead worker is one error", "data/supervision.py",
             "                if dead:\n", "                if False:\n",
             STOP + "test_a_killed_worker_saves_and_ends_in_one_line"),
    Mutation("a failed batch saves the run first", "training/loop.py",
             "reason = 0 if ended else world.largest(FAILED if failure else stop.number)",
             "reason = 0 if ended else world.largest(stop.number)\n            if failure: raise failure",
             STOP + "test_an_image_that_goes_bad_in_mid_run_saves_and_is_named"),
    # disk
    Mutation("a file is on the disk before it has its name", "files.py",
             "            flush(temporary)  # else", "            pass  # else",
             "test_files.py::test_a_file_is_on_disk_before_it_has_its_name"),
    Mutation("a failed write leaves no temporary file", "files.py",
             "            temporary.unlink(missing_ok=True)\n", "            pass\n",
             "test_files.py::test_a_failed_write_leaves_the_target_as_it_was"),
    Mutation("the files of a checkpoint are on the disk before it has its name", "training/checkpoint.py",
             "            flush(path)\n", "            pass\n",
             "training/test_checkpoint.py::test_the_files_of_a_checkpoint_are_on_disk_before_it_has_its_name"),
    Mutation("config.toml is written as a whole", "training/run_folder.py",
             "    atomic_write_text(path, to_toml(config))\n", "    path.write_text(to_toml(config))\n",
             DISK + "test_the_config_is_replaced_as_a_whole"),
    Mutation("training goes on while the disk refuses", "training/resume.py",
             "            if required:\n", "            if True:\n",
             DISK + "test_training_goes_on_without_a_checkpoint_until_there_is_space"),
    Mutation("lines of metrics wait for space", "training/metrics.py",
             "                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\n", "                break\n",
             DISK + "test_lines_of_metrics_wait_for_space"),
    Mutation("an error of the safetensors library is one of the system", "weights/tensor_file.py",
             "    except SafetensorError as error:\n", "    except ZeroDivisionError as error:\n",
             DISK + "test_an_error_of_the_safetensors_library_is_one_of_the_system"),
    Mutation("pointers are mended at the start", "training/resume.py",
             "    _mend(folder, saved.step, best)\n", "",
             DISK + "test_pointers_and_leftovers_are_mended_at_the_next_start"),
    Mutation("the deletion of old checkpoints is finished", "training/resume.py",
             "    checkpoint.remove_old(folder, KEEP, newest_step=step, best=best.step or None)\n", "",
             DISK + "test_the_deletion_of_old_checkpoints_is_finished_at_the_next_start"),
    Mutation("a run folder that is moved does not become two", "training/resume.py",
             "            if _identity_of(self._folder.parent) != self._run:\n", "            if False:\n",
             DISK + "test_a_run_folder_that_is_moved_in_mid_run_does_not_become_two"),
    Mutation("the model of a finished run changes only as a whole", "training/run_folder.py",
             "        save_pretrained(trained, work, card=card)\n",
             "        return save_pretrained(trained, folder, card=card)\n",
             DISK + "test_the_model_of_a_finished_run_is_never_a_mixture"),
    # not finite
    Mutation("tensors that are not finite are not saved", "training/resume.py",
             "if wrong := world.all_gather(checkpoint.not_finite(tensors) if world.is_main else [])[0]:",
             "if wrong := []:",
             DISK + "test_tensors_that_are_not_finite_are_not_saved"),
    Mutation("stored tensors that are not finite are passed over", "training/checkpoint.py",
             "    if wrong := not_finite(tensors):\n", "    if wrong := []:\n",
             DISK + "test_a_checkpoint_with_values_that_are_not_finite_is_passed_over"),
    # run folder
    Mutation("damage of a checkpoint is noticed", "training/checkpoint.py",
             " and sha256_of(file) == digest", "",
             "training/test_checkpoint.py::test_no_flipped_bit_of_the_tensors_goes_unnoticed"),
    Mutation("a renamed checkpoint is not read as another step", "training/checkpoint.py",
             "    if path.name != name_of(step):", "    if False:",
             "training/test_checkpoint.py::test_a_renamed_checkpoint_is_not_read_as_another_step"),
    Mutation("damaged metrics are noticed", "training/metrics.py",
             "bool(expected) and self.state() != expected", "False",
             FOLDER + "test_damaged_metrics_are_noticed_and_cost_neither_the_run_nor_the_plot"),
    Mutation("an edited config does not continue as another run", "training/resume.py",
             '        require_same(out, saved.state.get("config", {}), identity["config"])\n', "",
             FOLDER + "test_an_edited_config_does_not_continue_as_another_run"),
    Mutation("a run does not continue on other data", "training/resume.py",
             '            require_same_data(out, saved.state["data"], identity["data"])\n', "            pass\n",
             FOLDER + "test_a_run_does_not_continue_on_other_data"),
    Mutation("one process at a time trains in a folder", "training/run_folder.py",
             "            stack.enter_context(FileLock(out / \".lock\", timeout=0))\n", "            pass\n",
             FOLDER + "test_one_process_at_a_time_trains_in_a_run_folder"),
    Mutation("only regular files are read", "files.py",
             "        if not stat.S_ISREG(os.fstat(handle).st_mode):\n", "        if False:\n",
             "test_files.py::test_every_reader_refuses_hostile_files_at_once_in_one_line"),
    Mutation("TOML has a limit of dots", "files.py",
             "    if any(line.count(\".\") > _DOTS for line in text.splitlines()):\n", "    if False:\n",
             "test_files.py::test_toml_that_is_nested_deeply_is_refused_at_once"),
    # model folder
    Mutation("a model folder is compared with its checksums", "pretrained.py",
             '    verify(folder, "config.json")\n', "",
             "test_pretrained.py::test_a_flipped_bit_anywhere_in_a_model_folder_is_noticed"),
    Mutation("a config reaches only fields of a variant", "pretrained.py",
             "            if foreign := sorted(arguments.keys() - _FIELDS):\n", "            if foreign := []:\n",
             "test_pretrained.py::test_a_config_reaches_no_argument_that_is_no_field_of_a_variant"),
    # names
    Mutation("class names that cannot be kept are refused", "data/source.py",
             "def require_class_names(", "def require_class_names(*_, **__):\n    return\n\n\ndef _unused(",
             FOLDER + "test_a_class_that_cannot_be_kept_is_refused_before_the_first_step"),
    Mutation("a model card shows names as text", "training/run_folder.py",
             '    return re.sub(r"[^\\w\\s.,;:/+-]", lambda match: f"&#{ord(match[0])};", name)\n', "    return name\n",
             FOLDER + "test_the_card_shows_class_names_as_text"),
    Mutation("a CSV has no formulas", "files.py",
             '    return f"\'{text}" if text', '    return text if text',
             "test_files.py::test_the_examples_run"),
    Mutation("text from outside controls no terminal", "suggest.py",
             "c if c.isprintable() or c in kept else", "c if True else",
             LAWS + "test_text_laws.py::test_what_is_printed_controls_no_terminal"),
    Mutation("lines of metrics hold numbers", "diagnose/metrics_file.py",
             "    return row if all(sound) else None\n", "    return row\n",
             LAWS + "test_file_laws.py::test_a_line_of_metrics_holds_numbers_or_is_skipped"),
    Mutation("the newest checkpoint is that of the largest step", "weights/run_weights.py",
             "    return sorted(found, key=_step_in, reverse=True)\n", "    return sorted(found, reverse=True)\n",
             LAWS + "test_file_laws.py::test_the_newest_checkpoint_is_the_one_of_the_largest_step"),
    Mutation("a network fits in the file of its weights", "pretrained.py",
             "    if parameters > (size := weights.stat().st_size):\n", "    if False:\n", MODEL),
    Mutation("the numbers of a variant are possible", "models/variant.py",
             "            if not least <= number <= LARGEST:", "            if False:", MODEL),
    Mutation("the numbers of a preprocessing are possible", "preprocessing.py",
             "            if not possible:\n", "            if False:\n", MODEL),
    # limits
    Mutation("an image has a limit of bytes", "data/transforms/decode.py",
             "        if about.st_size > MAX_BYTES:", "        if False:",
             "data/transforms/test_decode.py::test_a_sparse_file_of_40_gigabytes_is_refused_without_reading_it"),
    Mutation("an image has a limit of pixels", "data/transforms/decode.py",
             "            if image.width * image.height > max_pixels:\n", "            if False:\n",
             "data/transforms/test_decode.py::test_a_bomb_is_refused_by_its_header"),
    Mutation("an image has a limit of parts", "data/transforms/decode.py",
             "        if self._left < 0:\n", "        if False:\n",
             "data/transforms/test_decode.py::test_an_image_of_many_parts_is_refused"),
    Mutation("formats that start an interpreter are not read", "data/transforms/decode.py",
             "Image.open(file, formats=allowed)", "Image.open(file)",
             "data/transforms/test_decode.py::test_formats_that_start_an_interpreter_are_refused"),
    Mutation("a wrong checksum of a PNG is noticed", "data/transforms/decode.py",
             "                _check_png(data)\n", "                pass\n",
             "data/transforms/test_decode.py::test_a_png_with_a_wrong_checksum_is_damaged"),
    Mutation("the number of workers has a limit", "training/config_values.py",
             " and int(match[1]) > MAX_WORKERS)", " and False)",
             CONFIG + "test_numbers_that_would_stop_the_machine_are_refused"),
    Mutation("the size of a batch has a limit", "training/config.py",
             "ge=1, le=MAX_BATCH)", "ge=1)",
             CONFIG + "test_numbers_that_would_stop_the_machine_are_refused"),
    Mutation("a huge number of repeats is refused at once", "training/resolve.py",
             "if repeats > batch_size:", "if repeats < batch_size:",
             CONFIG + "test_a_huge_number_of_repeats_is_refused_at_once"),
    Mutation("the images of a step fit in memory", "training/memory.py",
             "    if count * each > free:\n", "    if False:\n",
             CONFIG + "test_images_of_one_step_that_exceed_the_memory_are_refused"),
    Mutation("a file of torch.save has a limit of bytes", "weights/torch_file.py",
             "    if size > MAX_BYTES:\n", "    if False:\n",
             TORCH + "test_a_file_larger_than_any_network_is_not_read"),
    Mutation("a file of torch.save has no compressed members", "weights/torch_file.py",
             "            if member.compress_type != zipfile.ZIP_STORED:\n", "            if False:\n",
             TORCH + "test_compressed_members_and_large_pickles_are_refused"),
    Mutation("a file of torch.save has a limit of memory", "weights/torch_file.py",
             "        resource.RLIMIT_AS: mapped + 2 * size + MEMORY_SLACK,\n", "",
             TORCH + "test_a_file_that_asks_for_much_memory_stops_at_the_limit"),
    Mutation("a file of torch.save runs no code", "weights/torch_file.py",
             'map_location="cpu", weights_only=True)', 'map_location="cpu", weights_only=False)',
             TORCH + "test_code_in_a_file_does_not_run"),
    Mutation("names are printed in one line", "commands/audit_command.py",
             '        print(f"{one_line(image.name)}: ', '        print(f"{image.name}: ',
             "commands/test_audit.py::test_bad_images_are_named_with_reason_and_fix"),
    # server
    Mutation("the server checks the Host", "serve/origin.py",
             "        if host and not (_HOST.fullmatch(host) and ", "        if 0 and not (_HOST.fullmatch(host) and ",
             HOSTILE + "test_hosts_and_origins_of_other_sites_are_refused"),
    Mutation("the server checks the Origin", "serve/origin.py",
             "        if origin is not None and _netloc(origin)", "        if False and _netloc(origin)",
             HOSTILE + "test_hosts_and_origins_of_other_sites_are_refused"),
    Mutation("a Host is a name or an address", "serve/origin.py",
             "if host and not (_HOST.fullmatch(host) and ", "if host and not (True and ",
             HOSTILE + "test_hosts_and_origins_of_other_sites_are_refused"),
    Mutation("two lengths of a body end the connection", "serve/protocol_in_turn.py",
             "            cycle.keep_alive = False  # a proxy", "            pass  # a proxy",
             HOSTILE + "test_a_request_with_two_lengths_ends_its_connection"),
    Mutation("an Origin that is no URL is answered", "serve/origin.py",
             "        return urlsplit(url).netloc.lower()\n    except ValueError:\n",
             "        return urlsplit(url).netloc.lower()\n    except ZeroDivisionError:\n",
             LAWS + "test_server_laws.py::test_any_host_and_origin_are_answered"),
    Mutation("a client cannot take all connections", "serve/server.py",
             "            for among, most in ((own, max_each), (live, max_connections)):\n",
             "            for among, most in ((live, max_connections),):\n",
             HOSTILE + "test_a_client_cannot_take_all_connections"),
    Mutation("a client that does not read is disconnected", "serve/server.py",
             "            self._reader = self.loop.call_later(limits.body_seconds, self.transport.abort)\n",
             "            self._reader = None\n",
             HOSTILE + "test_a_client_that_does_not_read_its_response_is_disconnected"),
    Mutation("a client has a share of the pixels", "serve/limits.py",
             "        if own and own + amount > self.each:\n", "        if False:\n",
             HOSTILE + "test_the_pixels_of_all_waiting_images_have_a_limit_and_large_ones_do_not_delay_small_ones"),
    Mutation("waiting pixels have a limit", "serve/limits.py",
             "        if self.used + amount > self.limit:\n", "        if False:\n",
             HOSTILE + "test_the_pixels_of_all_waiting_images_have_a_limit_and_large_ones_do_not_delay_small_ones"),
    Mutation("large images have a lane of their own", "serve/decoding.py",
             "if size <= lane.max_pixels) for size in sizes]", "if True) for size in sizes]",
             HOSTILE + "test_the_pixels_of_all_waiting_images_have_a_limit_and_large_ones_do_not_delay_small_ones"),
    Mutation("clients take turns at decoding", "serve/fair_queue.py",
             "            self._queues[client] = queue  # behind the others\n",
             "            self._queues = {client: queue, **self._queues}\n",
             HOSTILE + "test_clients_take_turns"),
    Mutation("clients take turns in batches", "serve/fair_queue.py",
             "            self._queues[client] = queue  # behind the others\n",
             "            self._queues = {client: queue, **self._queues}\n",
             "serve/test_batching.py::test_clients_take_turns_in_the_batches_and_have_a_limit_each"),
    Mutation("the decoding for a client that left is given up", "serve/decoding.py",
             "        self.given_up = True\n", "",
             HOSTILE + "test_an_image_of_a_client_that_left_is_not_decoded_to_its_end"),
    Mutation("decoding stops between blocks", "data/transforms/decode.py",
             "        image.decodermaxblock = _BLOCK\n", "        pass\n",
             HOSTILE + "test_decoding_is_given_up_between_blocks"),
    Mutation("the pixels of a given-up image are freed", "serve/decoding.py",
             "                future.set_exception(CancelledError())\n", "                raise\n",
             HOSTILE + "test_the_pixels_of_an_image_that_was_given_up_are_freed_at_once"),
    Mutation("while others ask, a client has one request at work", "serve/turns.py",
             "self._at_once is None or alone or", "True or",
             HOSTILE + "test_while_others_ask_one_request_of_a_client_is_worked_on_at_a_time"),
    Mutation("a slow upload has no turn", "serve/protocol_in_turn.py",
             "self.loop.call_later(SILENT_SECONDS, self._end_turn)", "None",
             HOSTILE + "test_a_slow_upload_does_not_delay_other_requests_of_its_client"),
    Mutation("pipelined requests are not read", "serve/protocol_in_turn.py",
             "            cycle.keep_alive = False\n", "            pass\n",
             HOSTILE + "test_requests_that_do_not_wait_for_a_response_are_not_read"),
    Mutation("an unfinished head is cut off", "serve/server.py",
             "if self.cycle is None or self.cycle.response_complete:\n                self.transport.abort()", "pass",
             HOSTILE + "test_an_unfinished_head_does_not_hold_a_connection"),
    Mutation("all bodies together have a limit", "serve/upload.py",
             "        held.take(client, new)\n", "        held.used += new\n",
             "serve/test_app.py::test_bodies_over_all_requests_are_limited"),
    Mutation("a form has a limit of files", "serve/upload.py",
             "max_files=limits.max_files, max_fields", "max_files=10**9, max_fields",
             "serve/test_app.py::test_an_invalid_request_gets_one_line_and_a_status"),
    Mutation("an endless body is cut off", "serve/upload.py",
             "        if size + new > limits.max_bytes:\n", "        if False:\n",
             HOSTILE + "test_an_endless_body_is_cut_off"),
    Mutation("a body of tiny chunks is cut off", "serve/protocol_in_turn.py",
             "            if tiny and ", "            if False and ",
             HOSTILE + "test_a_body_of_tiny_chunks_is_cut_off"),
    Mutation("a form makes no temporary file", "serve/upload.py",
             "    spool_max_size = 1 << 40\n", "",
             "serve/test_app.py::test_a_form_is_kept_in_memory"),
    Mutation("a path is one line of the log", "serve/request_metrics.py",
             'log.exception("request %s: %s %r failed"', 'log.exception("request %s: %s %s failed"',
             "serve/test_app.py::test_a_path_with_an_end_of_line_is_one_line_of_the_log"),
    Mutation("the server listens on the loopback interface", "commands/serve_command.py",
             'metavar="ADDRESS")] = "127.0.0.1"', 'metavar="ADDRESS")] = "0.0.0.0"',
             "commands/test_serve.py::test_it_listens_on_the_loopback_interface_unless_told_otherwise"),
)  # fmt: skip


def cases(count: int) -> Iterator[Case]:
    """Return `count` of the mutations."""
    for index in spread(len(MUTATIONS), count):
        yield Case(CHECK, MUTATIONS[index].name, partial(noticed, MUTATIONS[index]))


def noticed(mutation: Mutation) -> Result:
    """Check that the test of a protection passes with it, and fails or does not end without it."""
    if (seconds := passes(mutation.test)) is None:
        return Result(1, 0, f"{mutation.test} fails with the protection")
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(Path(folder) / "tree")
        apply(mutation, tree)
        try:
            code, output = run_test(mutation.test, tree, patience=60 + 10 * seconds)
        except subprocess.TimeoutExpired:  # its own guard against a hang would end it later
            return Result(1, 1)
    if code == 1 or code < 0:  # a signal that is no longer handled ends pytest itself
        return Result(1, 1)
    wrong = f"pytest ended with {code}: {output[-300:]}" if code else f"{mutation.test} passes without it"
    return Result(1, 0, wrong)


def apply(mutation: Mutation, tree: Path) -> None:
    """Take the protection out of a copy of the repository.

    Raises:
        AssertionError: the line does not occur exactly once.
    """
    file = tree / "normfree" / mutation.file
    text = file.read_text(encoding="utf-8")
    assert text.count(mutation.line) == 1, (
        f"{text.count(mutation.line)} times in {mutation.file}: {mutation.line!r}"
    )
    file.write_text(text.replace(mutation.line, mutation.replacement), encoding="utf-8")


def copy_tree(target: Path) -> Path:
    """Copy the files that git knows, as they are now, and the compiled kernels; return the copy."""
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                            check=True, capture_output=True, text=True).stdout  # fmt: skip
    compiled = [str(path.relative_to(ROOT)) for path in ROOT.glob("normfree/native/_compiled*")]
    for name in [*filter(None, listed.split("\0")), *compiled]:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


@cache
def passes(test: str) -> float | None:
    """Return the seconds of a test in the repository as it is; None if it fails."""
    start = time.monotonic()
    return time.monotonic() - start if run_test(test, ROOT)[0] == 0 else None


def run_test(test: str, tree: Path, *, patience: float = 900) -> tuple[int, str]:
    """Run a test in a copy of the repository; return pytest's exit code and output.

    Raises:
        subprocess.TimeoutExpired: it has not ended after `patience` seconds; it was killed.
    """
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-m",
        "",
        f"tests/{test}",
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, timeout=patience
    )
    return process.returncode, process.stdout
