/** All that the page of one job knows, kept up to date by the job's events. */

import { call, get, type Job, type Page, type Schemas } from "../../lib/api";
import { followJob, type JobEvent, type Line, type Stop } from "../../lib/live.svelte";
import { merged, readFrom, type Series } from "./curves";

export type Checkpoint = Schemas["CheckpointDocument"];
export type Artifact = Schemas["ArtifactDocument"];

export const ENDED = ["succeeded", "failed", "cancelled"];
const POINTS = 1000;
const MOST_EVENTS_A_PAGE = 1000;
const BETWEEN_LOOKS_MS = 700;
/** A queued job's place moves without an event of its own. */
const QUEUED_LOOK_MS = 5000;

export class JobView {
  job = $state.raw<Job | null>(null);
  series = $state.raw<Series[]>([]);
  events = $state.raw<JobEvent[]>([]);
  checkpoints = $state.raw<Checkpoint[]>([]);
  artifacts = $state.raw<Artifact[]>([]);
  error = $state.raw<Error | null>(null);
  /** Whether the curves have been read once: until then "none" is not known. */
  hasCurves = $state(false);

  readonly path: string;
  #line: Line;
  #stop: Stop | null = null;
  #timer = 0;
  #lastLook = 0;
  #isClosed = false;
  #newest = 0;
  #reading: Promise<void> = Promise.resolve();

  constructor(id: string, line: Line) {
    this.path = `/v1/jobs/${id}`;
    this.#line = line;
  }

  get isOver(): boolean {
    return this.job !== null && ENDED.includes(this.job.state);
  }

  /** Curves and document first, for they are looked at first; then what has happened, and from there on what happens. */
  async open(): Promise<void> {
    this.error = null;
    try {
      await Promise.all([this.look(), this.#readCurves(-1)]);
      const seen = this.#newestStep();
      await Promise.all([this.#readEvents(), this.readFiles()]);
      // what the curves may lack: points that came between the two answers, and whatever went back to an earlier step
      const late = this.events.filter((one) => ["resumed", "rolled_back"].includes(one.type) || Number(one.data.to_step ?? one.data.step ?? -1) >= seen);
      this.#grow(late);
    } catch (error) {
      this.error = error as Error;
      return;
    }
    if (!this.#isClosed) this.follow();
  }

  close(): void {
    this.#isClosed = true;
    this.#stop?.();
    clearTimeout(this.#timer);
  }

  /** Listen from the last known event on; again after a job that had ended goes on. */
  follow(): void {
    this.#stop?.();
    this.#stop = followJob(this.job!.id, this.#newest, (events) => this.#receive(events), this.#line);
    this.#lookLater(QUEUED_LOOK_MS);
  }

  async look(): Promise<void> {
    this.#lastLook = Date.now();
    this.take(await get<Job>(this.path));
  }

  /** A document that an action has answered with. */
  take(job: Job): void {
    const wasOver = this.isOver;
    if (this.job && job.revision < this.job.revision) return;
    this.job = job;
    if (wasOver && !this.isOver) this.follow();
  }

  async readFiles(): Promise<void> {
    const [checkpoints, artifacts] = await Promise.all([
      get<Page<Checkpoint>>(`${this.path}/checkpoints`),
      get<Page<Artifact>>(`${this.path}/artifacts`),
    ]);
    this.checkpoints = checkpoints.data;
    this.artifacts = artifacts.data;
  }

  #receive(events: JobEvent[]): void {
    this.#newest = events.at(-1)!.seq;
    this.events = [...this.events, ...events];
    this.#grow(events);
    if (events.some((one) => ["checkpoint", "artifact", "state"].includes(one.type))) void this.readFiles().catch(() => {});
    this.#lookLater(Math.max(0, this.#lastLook + BETWEEN_LOOKS_MS - Date.now()));
  }

  #grow(events: readonly JobEvent[]): void {
    const from = readFrom(events);
    // one after the other: an older answer must not overtake a newer one
    if (from !== null) this.#reading = this.#reading.then(() => this.#readCurves(from)).catch((error: Error) => void (this.error = error));
  }

  async #readCurves(after: number): Promise<void> {
    const fresh = await get<Page<Series>>(`${this.path}/metrics`, { points: POINTS, after });
    this.series = merged(this.series, fresh.data, after);
    this.hasCurves = true;
  }

  async #readEvents(): Promise<void> {
    const found: JobEvent[] = [];
    for (let more = true; more && !this.#isClosed; ) {
      const page = await get<Page<JobEvent>>(`${this.path}/events`, { after: found.at(-1)?.seq ?? 0, limit: MOST_EVENTS_A_PAGE });
      found.push(...page.data);
      more = page.has_more;
    }
    this.events = found;
    this.#newest = found.at(-1)?.seq ?? 0;
  }

  #newestStep(): number {
    return Math.max(-1, ...this.series.map((one) => one.steps.at(-1) ?? -1));
  }

  #lookLater(ms: number): void {
    clearTimeout(this.#timer);
    this.#timer = window.setTimeout(() => {
      this.look()
        .catch(() => {}) // the line's badge says that the server is away
        .finally(() => !this.#isClosed && !this.isOver && this.#lookLater(QUEUED_LOOK_MS));
    }, ms);
  }
}

/** The text of one artifact that is JSON. */
export const readArtifact = async <T>(view: JobView, name: string): Promise<T> =>
  (await call("GET", `${view.path}/artifacts/${encodeURIComponent(name)}`)).json() as Promise<T>;
