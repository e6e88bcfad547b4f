"""`{% task_progress result %}` and `{% task_progress_media %}`; `rendering` does the work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django import template
from django.templatetags.static import static
from django.utils.html import format_html

from django_tasks_local_sse.rendering import widget_context

if TYPE_CHECKING:
    from django.utils.safestring import SafeString

register = template.Library()


@register.inclusion_tag("django_tasks_local_sse/task_progress.html", takes_context=True)
def task_progress(
    context: template.Context, result: Any, *, href: str | None = None, label: str | None = None
) -> dict[str, Any]:
    """
    Show the live progress of a task.

    `result` is the TaskResult; `href` is the page that the browser opens when the task succeeds;
    `label` replaces the task's name before the bar. Needs a template rendered with a request.
    """
    # `context.request` needs no context processor, and exists in `{% include … only %}` too.
    request = getattr(context, "request", None) or context.get("request")
    return widget_context(request, result, href=href, label=label)


@register.simple_tag(takes_context=True)
def task_progress_media(context: template.Context) -> SafeString:
    """Link the widget's style sheet and module, with any CSP nonce; once, in a page's head."""
    nonce = context.get("csp_nonce")
    # Not `if nonce`: Django's lazy nonce is false until it is rendered, and Django adds it to the
    # header only if it was rendered.
    attribute = "" if nonce is None else format_html(' nonce="{}"', nonce)
    return format_html(
        '<link rel="stylesheet" href="{}"{}>\n<script type="module" src="{}"{}></script>',
        static("django_tasks_local_sse/task-progress.css"),
        attribute,
        static("django_tasks_local_sse/task-progress.js"),
        attribute,
    )
