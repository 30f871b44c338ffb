// What the page remembers: settings across visits, the API key for this tab only. Works, forgetfully, where storage is off.

const forgetful = new Map();

function read(place, name) {
  try {
    return place().getItem(name);
  } catch {
    return forgetful.get(name) ?? null;
  }
}

function write(place, name, value) {
  try {
    if (value === null) place().removeItem(name);
    else place().setItem(name, value);
  } catch {
    forgetful.set(name, value);
  }
}

const lasting = () => localStorage;
const thisTab = () => sessionStorage;

export const recall = (name) => read(lasting, `lockstep.${name}`);
export const remember = (name, value) => write(lasting, `lockstep.${name}`, value);
export const apiKey = () => read(thisTab, "lockstep.key") ?? "";
export const setApiKey = (key) => write(thisTab, "lockstep.key", key || null);
