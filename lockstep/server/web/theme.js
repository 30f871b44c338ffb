// Before anything is painted: the appearance that was chosen here before. Not a module, because modules run later.
"use strict";
try {
  const chosen = localStorage.getItem("lockstep.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // storage is off: the system's choice holds
}
