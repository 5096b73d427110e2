/** Calls to the REST interface: typed documents in, `ApiError` for every refusal. */

import type { components } from "./schema";

export type Schemas = components["schemas"];
export type Problem = Schemas["Problem"];
export type Job = Schemas["JobDocument"];
export type JobState = Schemas["JobState"];
export type Experiment = Schemas["ExperimentDocument"];
export type ExperimentLine = Schemas["ExperimentSummaryDocument"];
export type Page<T> = { object: "list"; data: T[]; has_more: boolean; first_id: string | null; last_id: string | null };

export class ApiError extends Error {
  constructor(
    readonly problem: Problem,
    readonly retryAfterS: number | null,
  ) {
    super(problem.detail || problem.title);
    this.name = "ApiError";
  }

  /** What is said of one field of the body, by its JSON pointer. */
  at(pointer: string): string | null {
    return this.problem.errors.find((one) => one.pointer === pointer)?.detail ?? null;
  }
}

/** The server cannot be reached. */
export class Unreachable extends Error {
  constructor() {
    super("The server does not answer. It may be restarting: what you see is the last that was known.");
    this.name = "Unreachable";
  }
}

type Options = { query?: Record<string, unknown>; body?: unknown; headers?: Record<string, string>; signal?: AbortSignal };

export function address(path: string, query: Record<string, unknown> = {}): string {
  const pairs = new URLSearchParams();
  for (const [name, value] of Object.entries(query)) {
    for (const one of Array.isArray(value) ? value : [value]) if (one !== null && one !== undefined && one !== "") pairs.append(name, String(one));
  }
  return pairs.size ? `${path}?${pairs}` : path;
}

export async function call(method: string, path: string, { query, body, headers, signal }: Options = {}): Promise<Response> {
  const sent = new Headers(headers);
  if (body !== undefined) sent.set("Content-Type", "application/json");
  let answer: Response;
  try {
    answer = await fetch(address(path, query), { method, headers: sent, body: body === undefined ? null : JSON.stringify(body), signal: signal ?? null });
  } catch (error) {
    if ((error as Error).name === "AbortError") throw error;
    throw new Unreachable();
  }
  if (answer.ok || answer.status === 304) return answer;
  const problem = await refusal(answer);
  if (problem.status === 401) window.dispatchEvent(new Event("signed-out"));
  throw new ApiError(problem, Number(answer.headers.get("Retry-After")) || null);
}

async function refusal(answer: Response): Promise<Problem> {
  const said = (await answer.json().catch(() => null)) as Partial<Problem> | null;
  const plain = { type: "about:blank", title: answer.statusText, detail: "", instance: "", code: "", status: answer.status, errors: [] };
  return { ...plain, ...said } as Problem;
}

export const get = async <T>(path: string, query: Record<string, unknown> = {}, signal?: AbortSignal): Promise<T> =>
  (await call("GET", path, { query, ...(signal && { signal }) })).json() as Promise<T>;

export const post = async <T>(path: string, body?: unknown, query: Record<string, unknown> = {}): Promise<T> => {
  // a call that is repeated after a lost answer must not make a second job
  const headers = { "Idempotency-Key": crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}` };
  const answer = await call("POST", path, { query, ...(body !== undefined && { body, headers }) });
  return (answer.status === 204 ? null : answer.json()) as Promise<T>;
};

export const patch = async <T>(path: string, body: unknown, headers: Record<string, string> = {}): Promise<T> =>
  (await call("PATCH", path, { body, headers })).json() as Promise<T>;

export const remove = async (path: string, query: Record<string, unknown> = {}): Promise<void> => void (await call("DELETE", path, { query }));
