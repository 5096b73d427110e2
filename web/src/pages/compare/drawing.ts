/** Lines of their own x on a canvas: pixels are device pixels. */

import { firstFrom, type Drawn } from "./curves";

export interface View {
  x0: number;
  x1: number;
  y0: number;
  y1: number;
  log: boolean;
  box: { left: number; top: number; width: number; height: number };
}

type Place = (value: number) => number;

function placeX({ x0, x1, box }: View): Place {
  const scale = box.width / (x1 - x0 || 1);
  return (value) => box.left + (value - x0) * scale;
}

function placeY({ y0, y1, log, box }: View): Place {
  const [low, high] = log ? [Math.log(y0), Math.log(y1)] : [y0, y1];
  const scale = box.height / (high - low || 1);
  return (value) => box.top + box.height - ((log ? Math.log(value) : value) - low) * scale;
}

const hasPlace = (value: number | null | undefined, log: boolean): value is number => value !== null && value !== undefined && Number.isFinite(value) && !(log && value <= 0);

export function strokeLine(pen: CanvasRenderingContext2D, { x, y }: Drawn, view: View, ink: string, width: number): void {
  const [px, py] = [placeX(view), placeY(view)];
  pen.strokeStyle = ink;
  pen.lineWidth = width;
  pen.lineJoin = "round";
  pen.beginPath();
  const [from, to] = within(x, view.x0, view.x1);
  let points = 0;
  for (let i = from; i < to; i++) {
    const value = y[i];
    if (!hasPlace(value, view.log)) continue;
    if (points++) pen.lineTo(px(x[i]!), py(value));
    else pen.moveTo(px(x[i]!), py(value));
    if (to - from === 1) pen.arc(px(x[i]!), py(value), width, 0, 2 * Math.PI);
  }
  pen.stroke();
}

export function strokeBand(pen: CanvasRenderingContext2D, { x, band }: Drawn, view: View, ink: string): void {
  if (!band) return;
  const [px, py] = [placeX(view), placeY(view)];
  const floor = view.log ? view.y0 : Number.NEGATIVE_INFINITY;
  pen.fillStyle = ink;
  pen.beginPath();
  for (let i = 0; i < x.length; i++) pen.lineTo(px(x[i]!), py(Math.max(floor, band.high[i]!)));
  for (let i = x.length - 1; i >= 0; i--) pen.lineTo(px(x[i]!), py(Math.max(floor, band.low[i]!)));
  pen.fill();
}

/** Indices of what is seen, with one more on both sides so that lines leave the picture. */
function within(x: ArrayLike<number>, from: number, to: number): [number, number] {
  return [Math.max(0, firstFrom(x, from) - 1), Math.min(x.length, firstFrom(x, to) + 1)];
}

/** Least and most of x, or of the y that is seen, with some air. */
export function extent(lines: readonly Drawn[], of: "x" | "y", zoom: [number, number] | null = null, log = false): [number, number] {
  let [low, high] = [Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY];
  const take = (value: number | null | undefined) => {
    if (!hasPlace(value, log)) return;
    if (value < low) low = value;
    if (value > high) high = value;
  };
  for (const { x, y, band } of lines) {
    if (of === "x") {
      take(x[0]);
      take(x[x.length - 1]);
      continue;
    }
    const [from, to] = zoom ? within(x, ...zoom) : [0, x.length];
    for (let i = from; i < to; i++) {
      take(y[i]);
      take(band?.low[i]);
      take(band?.high[i]);
    }
  }
  if (low > high) return log ? [0.1, 1] : [0, 1];
  if (log) return [low / 1.1, high * 1.1];
  const air = low === high ? Math.abs(low) * 0.1 || 1 : of === "x" ? 0 : (high - low) * 0.05;
  return [low - air, high + air];
}

/** The line next to a point of the picture, at most `reach` pixels above or below it. */
export function nearest(lines: readonly Drawn[], view: View, left: number, top: number, reach: number): string | null {
  const at = view.x0 + (left / view.box.width) * (view.x1 - view.x0);
  const py = placeY({ ...view, box: { ...view.box, top: 0 } });
  let [found, least]: [string | null, number] = [null, reach];
  for (const { id, x, y } of lines) {
    const after = firstFrom(x, at);
    if (after === x.length || (after === 0 && x[0] !== at)) continue;
    const [one, other] = [y[Math.max(0, after - 1)], y[after]];
    if (!hasPlace(one, view.log) || !hasPlace(other, view.log)) continue;
    const share = after === 0 ? 1 : (at - x[after - 1]!) / (x[after]! - x[after - 1]!);
    const distance = Math.abs(py(one) + (py(other) - py(one)) * share - top);
    if (distance < least) [found, least] = [id, distance];
  }
  return found;
}
