/**
 * <task-progress src="/tasks/events/?task=…" [href="/done/"] [label="Import"]>
 *
 * Shows one background task, live. The elements of a page share one EventSource:
 *
 *     element ─┐                 ┌─ Connection ── EventSource   (one per stream URL, or more
 *     element ─┼─ plan() ────────┤                               when the URL gets too long)
 *     element ─┘                 └─ Connection ── EventSource
 *
 * Every connection begins with the state of all its tasks and every event carries the whole state
 * of its task. So nothing here keeps a history: a connection can be made anew at any moment.
 */

const URL_LIMIT = 4000; // bytes; gunicorn refuses a request line of more than 4094
const MESSAGE_LIMIT = 2000; // characters; a few lines are seen, but all are laid out: 1 MB in 1 s
const GRACE = 3000; // ms without a connection before it is worth telling the user
const RETRY_MIN = 1000; // ms
const RETRY_MAX = 30000; // ms

const KINDS = ["enqueued", "started", "progress", "finished", "unknown", "refused"];

const WORDS = {
  waiting: "Waiting",
  running: "Running",
  done: "Done",
  failed: "Failed",
  cancelled: "Cancelled",
  lost: "Lost",
  died: "Crashed",
  timeout: "Timed out",
  unknown: "Unknown task",
  reconnecting: "Reconnecting…",
};

const elements = new Set(); // those that are in the document
const connections = new Set();
const announced = new WeakSet(); // ends that the page has been told of, not only a removed element
let planned = false;

/** One EventSource, made anew when the browser has given it up. */
class Connection {
  tokens = new Map(); // task id -> token, of the tasks that are still of interest
  #last = new Map(); // task id -> its last payload, for elements that come later
  down = false;
  #source;
  #retry;
  #alarm;
  #delay = 0;

  constructor(base) {
    this.base = base;
  }

  drop(id) {
    this.tokens.delete(id);
    this.#last.delete(id);
  }

  url(more = []) {
    const query = [...this.tokens.values(), ...more].map((t) => "task=" + encodeURIComponent(t));
    return this.base + (this.base.includes("?") ? "&" : "?") + query.join("&");
  }

  get abandoned() {
    return this.#source?.readyState === EventSource.CLOSED;
  }

  open() {
    this.#stop();
    const source = (this.#source = new EventSource(this.url()));
    source.onopen = () => {
      this.#delay = 0;
      this.#settle(false);
    };
    source.onerror = () => {
      // Not at once: a server without async streams ends each one early, on purpose, and has the
      // browser poll. Only a connection that stays away is news.
      this.#alarm ??= setTimeout(() => this.#settle(true), GRACE);
      if (this.abandoned) {
        this.#delay = Math.min(this.#delay * 2 || RETRY_MIN, RETRY_MAX);
        this.#retry = setTimeout(() => this.open(), this.#delay * (0.5 + Math.random() / 2));
      }
    };
    for (const kind of KINDS) source.addEventListener(kind, (event) => this.#receive(event.data));
  }

  close() {
    this.#stop();
    this.#settle(false);
  }

  #stop() {
    clearTimeout(this.#retry);
    this.#source?.close();
    this.#source = null;
  }

  #settle(down) {
    clearTimeout(this.#alarm);
    this.#alarm = null;
    this.down = down;
    this.brief();
  }

  /** Tell the elements what they may have come too late to hear. */
  brief() {
    for (const element of this.#elements()) {
      element.down = this.down;
      const payload = this.#last.get(element.taskId);
      if (payload) element.catchUp(payload);
    }
  }

  #receive(data) {
    let payload;
    try {
      payload = JSON.parse(data);
      payload.id; // throws for null
    } catch (error) {
      console.warn("task-progress: not a payload", error);
      return;
    }
    if (this.tokens.has(payload.id)) this.#last.set(payload.id, payload);
    for (const element of this.#elements(payload.id)) element.apply(payload);
  }

  #elements(id) {
    return [...elements].filter(
      (e) => e.base === this.base && (id === undefined ? this.tokens.has(e.taskId) : e.taskId === id),
    );
  }
}

/** Plan at the end of this turn: what comes together, or only moves, is planned for once. */
function schedulePlan() {
  if (!planned) setTimeout(plan);
  planned = true;
}

/** Bring the connections in line with the elements, and disturb as few of them as possible. */
function plan() {
  if (document.readyState === "loading") {
    // An async script can run before the parser has come to the children, or to all elements.
    document.addEventListener("DOMContentLoaded", plan, { once: true });
    return;
  }
  planned = false;

  const wanted = new Map(); // base -> task id -> token
  for (const element of elements) {
    element.render();
    if (element.settled || !element.base) continue;
    if (!wanted.has(element.base)) wanted.set(element.base, new Map());
    wanted.get(element.base).set(element.taskId, element.token);
  }

  const changed = new Set();
  for (const connection of connections) {
    const tokens = wanted.get(connection.base);
    for (const [id, old] of connection.tokens) {
      const token = tokens?.get(id);
      if (!token) {
        connection.drop(id);
        continue;
      }
      connection.tokens.set(id, token);
      tokens.delete(id);
      // A fresh link may open what the old one did not; a working stream needs no new one.
      if (token !== old && connection.abandoned) changed.add(connection);
    }
    if (!connection.tokens.size) {
      connection.close();
      connections.delete(connection);
    }
  }

  for (const [base, tokens] of wanted) {
    for (const [id, token] of tokens) {
      let connection = [...connections].find(
        (c) => c.base === base && c.url([token]).length < URL_LIMIT,
      );
      if (!connection) connections.add((connection = new Connection(base)));
      connection.tokens.set(id, token);
      changed.add(connection);
    }
  }
  for (const connection of changed) connection.open();
  for (const connection of connections) connection.brief();
}

addEventListener("online", () => {
  // All of them: a stream that was cut off by a change of network looks open for minutes.
  for (const connection of connections) connection.open();
});
document.addEventListener("visibilitychange", () => {
  for (const c of connections) if (!document.hidden && c.abandoned) c.open();
});
addEventListener("pagehide", () => {
  // An open stream would keep the page out of the back/forward cache.
  for (const connection of connections) connection.close();
});
addEventListener("pageshow", (event) => {
  if (event.persisted) for (const connection of connections) connection.open();
});

function left(seconds) {
  if (!(seconds > 1)) return "";
  if (seconds < 90) return ` · ${Math.round(seconds)} s left`;
  if (seconds < 5400) return ` · ${Math.round(seconds / 60)} min left`;
  return ` · ${Math.round(seconds / 360) / 10} h left`;
}

/** What is to be seen of a payload. */
function viewOf({ kind, status, name, position, progress, error }) {
  const { current, percent, message, eta } = progress ?? {};
  const view = { name, message: message ?? "", value: percent ?? null };

  if (kind === "finished") {
    const reason = status === "SUCCESSFUL" ? "done" : (error?.reason ?? "failed");
    view.state = reason === "done" || reason === "cancelled" ? reason : "failed";
    view.detail = WORDS[reason] ?? WORDS.failed;
    if (reason === "done") view.value = 100;
    const text = [error?.type?.split(".").pop(), error?.message].filter(Boolean).join(": ");
    if (text && view.state === "failed") view.message = text;
  } else {
    view.state = { enqueued: "waiting", unknown: "unknown", refused: "unknown" }[kind] ?? "running";
    if (kind === "refused") view.message = error?.message ?? "";
    view.detail = WORDS[view.state];
    if (view.state === "running") {
      // Rounded down: "100 %" is for what is really complete.
      if (percent != null) view.detail = Math.floor(percent) + " %" + left(eta);
      else if (current != null) view.detail = current.toLocaleString("en");
    } else if (position) view.detail += `, ${position.toLocaleString("en")} before it`;
  }
  // A bar without a value moves for ever, and only a running task may look busy.
  if (view.state !== "running") view.value ??= 0;
  return view;
}

export class TaskProgressElement extends HTMLElement {
  static observedAttributes = ["src", "label"];

  /** Safe to call twice: pages do load a module under two addresses. */
  static define(tag = "task-progress", registry = customElements) {
    if (!registry.get(tag)) registry.define(tag, this);
    return registry.get(tag);
  }

  base = null; // the stream's URL without its tasks; elements with the same one share it
  taskId = null;
  token = null;
  settled = false; // nothing more is expected
  #finished = false;
  #sequence = 0;
  #place = Infinity; // in the queue: with the same sequence, a lower one is later
  #view = null;
  #down = false;
  #frame = 0;

  connectedCallback() {
    elements.add(this);
    if (document.readyState !== "loading") this.render();
    schedulePlan();
  }

  disconnectedCallback() {
    elements.delete(this);
    schedulePlan();
  }

  attributeChangedCallback(attribute) {
    if (attribute === "src") this.#aim();
    else if (this.#view) this.render();
  }

  set down(value) {
    if (value === this.#down) return;
    this.#down = value;
    this.#renderSoon();
  }

  /** Take over a payload, and tell the page of it. */
  apply(payload) {
    if (!this.#take(payload)) return;
    this.#emit("task-progress", payload);
    this.#end(payload);
  }

  /** Take over what came before this element did, unless the server has rendered what is later. */
  catchUp(payload) {
    const known = payload.sequence <= this.dataset.sequence; // not, for one that is bare
    if ((known && payload.kind !== "finished") || !this.#take(payload)) return;
    // The page has been told. If it renders its bars anew at each event, it would do so for ever.
    if (!announced.has(payload)) this.#end(payload);
  }

  /** Show a payload; false if it is older than what is shown. */
  #take(payload) {
    const { kind, sequence } = payload;
    const place = payload.position ?? Infinity;
    const unknown = kind === "unknown" || kind === "refused";
    const finished = kind === "finished";
    if (this.#finished || (unknown && this.settled)) return false;
    const later =
      sequence > this.#sequence || (sequence === this.#sequence && place < this.#place);
    if (!unknown && !finished && !later) return false;

    const settled = finished || unknown;
    if (this.settled !== settled) schedulePlan();
    this.settled = settled;
    this.#finished = finished;
    this.#sequence = unknown ? 0 : sequence;
    this.#place = place;
    this.#view = viewOf(payload);
    if (settled) this.render(); // who listens for the end may look at the element, or remove it
    else this.#renderSoon();
    return true;
  }

  /** Write what has changed, and build the parts that the server has not. */
  render() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    const parts = this.#parts();
    const bare = !this.dataset.state;
    this.#view ??= {
      state: this.dataset.state ?? "waiting",
      detail: bare ? WORDS.waiting : parts.detail?.textContent,
      value: bare ? 0 : undefined,
    };
    const { name, value, message } = this.#view;
    const state = this.#down ? "reconnecting" : this.#view.state;
    const detail = this.#down ? WORDS.reconnecting : this.#view.detail;

    write(parts.name, this.getAttribute("label") || name);
    write(parts.detail, detail);
    write(parts.message, message?.slice(0, MESSAGE_LIMIT));
    if (value !== undefined) {
      set(parts.bar, "value", value);
      // Where the number says nothing, a screen reader has what stands beside the bar.
      const wordy = value === null || this.#view.state === "waiting";
      set(parts.bar, "aria-valuetext", wordy ? detail : null);
    }
    if (this.dataset.state !== state) {
      this.dataset.state = state;
      // The one live region, and the only place that writes it: percents are not announced.
      const word = state === "running" ? WORDS.running : detail;
      if (!bare) write(parts.status, [parts.name?.textContent, word].filter(Boolean).join(": "));
    }
  }

  #renderSoon() {
    this.#frame ||= requestAnimationFrame(() => this.render());
  }

  #parts() {
    // Looked up each time, because the page may have swapped or morphed them meanwhile.
    const find = (name) => this.querySelector(`.task-progress-${name}`);
    if (!find("bar")) {
      const label = make("label", "label");
      label.append(make("span", "name"), make("progress", "bar"));
      const status = make("span", "status");
      status.setAttribute("role", "status");
      this.replaceChildren(label, make("span", "detail"), make("span", "message"), status);
      find("bar").max = 100;
    }
    const [name, bar, detail, message, status] = "name bar detail message status".split(" ").map(find);
    return { name, bar, detail, message, status };
  }

  /** Read `src`; another task starts from nothing, a fresh link to the same one changes nothing. */
  #aim() {
    const before = this.taskId;
    this.base = this.taskId = this.token = null;
    const src = this.getAttribute("src");
    if (src) {
      try {
        const url = new URL(src, this.baseURI);
        this.token = url.searchParams.get("task");
        this.taskId = decodeURIComponent(this.token.split(".")[0]);
        url.searchParams.delete("task");
        url.hash = "";
        this.base = url.href;
      } catch (error) {
        console.warn("task-progress: not a task's src", src, error);
      }
    }
    if (this.#view && this.taskId !== before) {
      this.#finished = this.settled = false;
      this.#sequence = 0;
      this.#place = Infinity;
      delete this.dataset.sequence;
      this.#view = { state: "waiting", detail: WORDS.waiting, name: "", message: "", value: 0 };
      this.render();
    }
    if (this.isConnected) schedulePlan();
  }

  #emit(type, detail) {
    return this.dispatchEvent(new CustomEvent(type, { bubbles: true, cancelable: true, detail }));
  }

  #end(payload) {
    if (payload.kind !== "finished") return;
    if (this.isConnected) announced.add(payload);
    if (this.#emit("task-finished", payload) && this.#view.state === "done") this.#leave();
  }

  #leave() {
    const href = this.getAttribute("href");
    if (!href) return;
    try {
      const url = new URL(href, this.baseURI);
      // Replaced, or the way back would lead to this page, and from it forward again.
      if (/^https?:$/.test(url.protocol)) location.replace(url);
    } catch (error) {
      console.warn("task-progress: not a page's href", href, error);
    }
  }
}

function make(tag, name) {
  const element = document.createElement(tag);
  element.className = `task-progress-${name}`;
  return element;
}

function write(element, text) {
  if (element && text !== undefined && element.textContent !== text) element.textContent = text;
}

/** Set an attribute, unless it is so already; null removes it. */
function set(element, name, value) {
  if (value === null) element.removeAttribute(name);
  else if (element.getAttribute(name) !== `${value}`) element.setAttribute(name, value);
}

TaskProgressElement.define();
