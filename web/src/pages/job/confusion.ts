/** confusion.json: the whole matrix, or, of very many classes, what is right of each and the mistakes. */

export type ConfusionFile = { class_names: string[]; images: number } & (
  | { matrix: number[][] }
  | { correct: number[]; mistakes: [truth: number, prediction: number, count: number][] }
);
export type Pair = { truth: string; prediction: string; count: number; share: number };

/** What is taken for what, most often first. share: of the images of that class. */
export function pairs(file: ConfusionFile, most: number): Pair[] {
  const wrong = "matrix" in file ? file.matrix.flatMap((row, i) => row.map((count, j) => [i, j, count] as const).filter(([, j]) => j !== i)) : file.mistakes;
  const totals = file.class_names.map((_, i) =>
    "matrix" in file ? file.matrix[i]!.reduce((a, b) => a + b, 0) : file.correct[i]! + file.mistakes.reduce((sum, [truth, , count]) => sum + (truth === i ? count : 0), 0),
  );
  return wrong
    .filter(([, , count]) => count > 0)
    .sort((a, b) => b[2] - a[2])
    .slice(0, most)
    .map(([i, j, count]) => ({ truth: file.class_names[i]!, prediction: file.class_names[j]!, count, share: count / Math.max(1, totals[i]!) }));
}
