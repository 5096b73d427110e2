/** Colours of lines: distinguishable for the common kinds of colour blindness (Okabe and Ito's, darkened or lightened to 3 : 1 on the ground). */
const LIGHT = ["#0067a5", "#b85c00", "#00795a", "#a3447f", "#6f5bb5", "#8a6d00", "#c03a2b", "#3d7a99", "#5b6b00", "#555e70"];
const DARK = ["#63b3f0", "#f0a04b", "#4cc9a0", "#e58bc3", "#b3a1ff", "#e0c341", "#ff8a7a", "#8cc7e0", "#b7c95a", "#aab4c5"];

export function colour(index: number, isDark: boolean): string {
  const palette = isDark ? DARK : LIGHT;
  return palette[index % palette.length]!;
}
