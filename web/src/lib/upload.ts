/** A file sent with its progress: `fetch` does not tell how far it is. */

import { address, ApiError, Unreachable, type Problem } from "./api";

export type Upload = { answer: Promise<unknown>; abort: () => void };

/** onProgress: share of the bytes sent, 0 to 1. Raises ApiError and Unreachable as other calls do. */
export function upload(path: string, query: Record<string, unknown>, file: File, mediaType: string, onProgress: (share: number) => void): Upload {
  const request = new XMLHttpRequest();
  const answer = new Promise<unknown>((resolve, reject) => {
    request.open("POST", address(path, query));
    request.setRequestHeader("Content-Type", mediaType);
    request.responseType = "json";
    request.upload.onprogress = (event) => event.lengthComputable && onProgress(event.loaded / event.total);
    request.onload = () => (request.status < 300 ? resolve(request.response) : reject(refusal(request)));
    request.onerror = () => reject(new Unreachable());
    request.onabort = () => reject(new Error("The upload was stopped: nothing is stored."));
    request.send(file);
  });
  return { answer, abort: () => request.abort() };
}

function refusal(request: XMLHttpRequest): ApiError {
  const plain = { type: "about:blank", title: request.statusText, detail: "", instance: "", code: "", status: request.status, errors: [] };
  return new ApiError({ ...plain, ...(request.response as Partial<Problem> | null) } as Problem, Number(request.getResponseHeader("Retry-After")) || null);
}

const TYPES: [RegExp, string][] = [
  [/\.zip$/i, "application/zip"],
  [/\.tar$/i, "application/x-tar"],
  [/\.(tar\.gz|tgz)$/i, "application/gzip"],
  [/\.(tar\.bz2|tbz2?)$/i, "application/x-bzip2"],
  [/\.(tar\.xz|txz)$/i, "application/x-xz"],
];

/** What an archive is sent as; null is none that the server takes. */
export function archiveType(name: string): string | null {
  return TYPES.find(([pattern]) => pattern.test(name))?.[1] ?? null;
}

/** A data set's name from a file's: "My flowers.tar.gz" is "my-flowers". */
export function nameOf(file: string): string {
  const stem = TYPES.reduce((name, [pattern]) => name.replace(pattern, ""), file);
  return stem.toLowerCase().replace(/[^a-z0-9._-]+/g, "-").replace(/^[-._]+|[-._]+$/g, "").slice(0, 64);
}
