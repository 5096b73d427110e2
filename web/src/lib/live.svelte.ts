/** What the server says by itself, and whether it still does: `live`, `reconnecting`, or `ended`. */

import { ApiError, call } from "./api";

export type Badge = "live" | "reconnecting" | "ended";

/** Runs what a `$effect` returns as its clean-up. */
export type Stop = () => void;

const EVENT_TYPES = [
  "created", "state", "claimed", "plan", "phase", "metrics", "evaluation", "checkpoint", "checkpoint_failed", "checkpoint_skipped",
  "resumed", "rolled_back", "note", "artifact", "attempt_ended", "end",
] as const;
const LONGEST_PAUSE_MS = 10_000;

export type JobEvent = { seq: number; at: string; type: string; data: Record<string, unknown> };

/** The connection of one page, shown in the head of every page. */
export class Line {
  badge = $state<Badge>("reconnecting");
}

/**
 * A job's events from `after` on, each exactly once and in order, over every break of the connection; ends with the job.
 *
 * onEvents: gets what came since the last call, at most once a frame: a burst of a thousand events is one update of the page.
 */
export function followJob(jobId: string, after: number, onEvents: (events: JobEvent[]) => void, line: Line): Stop {
  let seen = after;
  let pending: JobEvent[] = [];
  let source: EventSource | null = null;
  let tries = 0;
  let timer = 0;
  let frame = 0;

  const flush = () => {
    frame = 0;
    const events = pending;
    pending = [];
    if (events.length) onEvents(events);
  };
  const receive = (message: MessageEvent<string>) => {
    if (message.type === "end") {
      line.badge = "ended";
      source?.close();
      return;
    }
    const event = JSON.parse(message.data) as JobEvent;
    if (event.seq <= seen) return;
    seen = event.seq;
    pending.push(event);
    // a hidden page gets no frames
    frame ||= document.hidden ? window.setTimeout(flush, 200) : requestAnimationFrame(flush);
  };
  // another job's end may stand there
  line.badge = "reconnecting";
  const open = () => {
    source = new EventSource(`/v1/jobs/${jobId}/events?after=${seen}`);
    for (const type of EVENT_TYPES) source.addEventListener(type, receive as EventListener);
    source.onmessage = receive;
    source.onopen = () => {
      tries = 0;
      line.badge = "live";
    };
    source.onerror = () => {
      if (line.badge === "ended") return;
      line.badge = "reconnecting";
      // the browser's own second try gives up for good at the first answer that is no stream (a proxy's 502): ours does not
      source?.close();
      timer = window.setTimeout(open, Math.min(LONGEST_PAUSE_MS, 250 * 2 ** tries++) * (0.75 + Math.random() / 2));
    };
  };
  open();
  return () => {
    source?.close();
    clearTimeout(timer);
    cancelAnimationFrame(frame);
    clearTimeout(frame);
  };
}

/**
 * A document that follows the server's: fetched, then asked for again with its ETag. Where the route can wait (`?wait=`), an answer comes
 * when something changed; elsewhere every `everyMs`.
 */
export function followDocument<T>(
  path: () => string,
  onDocument: (document: T) => void,
  line: Line,
  { waits = false, everyMs = 3000, onError = (_: Error) => {} }: { waits?: boolean; everyMs?: number; onError?: (error: Error) => void } = {},
): Stop {
  const abort = new AbortController();
  let etag: string | null = null;
  let tries = 0;

  const once = async () => {
    const asked = path();
    const wait = waits && etag !== null ? `${asked.includes("?") ? "&" : "?"}wait=30` : "";
    const answer = await call("GET", asked + wait, { headers: etag ? { "If-None-Match": etag } : {}, signal: abort.signal });
    etag = answer.headers.get("ETag");
    line.badge = "live";
    tries = 0;
    if (answer.status !== 304) onDocument((await answer.json()) as T);
    return waits && etag !== null ? 0 : everyMs;
  };
  const run = async () => {
    while (!abort.signal.aborted) {
      let pauseMs: number;
      try {
        pauseMs = await once();
      } catch (error) {
        if (abort.signal.aborted) return;
        line.badge = "reconnecting";
        onError(error as Error);
        if (error instanceof ApiError && error.problem.status < 500 && error.problem.status !== 429) return;
        pauseMs = Math.min(LONGEST_PAUSE_MS, 500 * 2 ** tries++);
      }
      if (pauseMs) await sleep(pauseMs, abort.signal);
    }
  };
  void run();
  return () => abort.abort();
}

/** Until the time is over, the page is looked at again, or the signal comes. */
function sleep(ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}
