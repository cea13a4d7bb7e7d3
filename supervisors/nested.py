"""What a child of type "supervisor" runs."""

from __future__ import annotations

from llm_runtime.supervisors import messages
from llm_runtime.supervisors.link import ChildContext
from llm_runtime.supervisors.supervisor import Supervisor


class NestedSupervisor:
    """A supervisor below another one: the same event loop, with a link instead of callbacks."""

    @classmethod
    def run(cls, context: ChildContext) -> None:
        """Supervises until asked to stop, or until its own failure; then says why and exits with code 1."""
        assert context.supervisor is not None
        link = context.link
        supervisor = Supervisor(
            context.supervisor,
            context.run_dir,
            name=context.id,
            descriptors=context.descriptors,
            generation=context.incarnation,
            incarnations=context.incarnations,
            link=link,
        )
        supervisor.start_zygote()
        supervisor.adopt_stored_fds(context.stored_fds)
        result = supervisor.run()
        link.send(messages.Ending(ok=result.ok, text=result.text, culprit=result.culprit))
        if not result.ok:
            raise SystemExit(1)
