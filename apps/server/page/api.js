// What the page asks the server. Errors are one line meant for people.

export class Mistake extends Error {}

export async function call(path, body, method = body === undefined ? "GET" : "POST") {
  let answer;
  try {
    answer = await fetch(path, {
      method,
      headers: body === undefined ? {} : { "content-type": "application/json" },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch {
    throw new Mistake("The server does not answer.");
  }
  if (answer.status === 401) {
    await login();
    return call(path, body, method);
  }
  const found = answer.status === 204 ? null : await answer.json();
  if (!answer.ok) throw new Mistake(found.detail || `The server answered ${answer.status}.`);
  return found;
}

let asking = null;

// The token goes into a cookie that scripts can't read and no other site can send.
async function session(token) {
  const answer = await fetch("/api/session", { method: "POST", headers: { authorization: `Bearer ${token}` } });
  return answer.ok;
}

export async function tokenFromAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  const token = given.get("token");
  if (!token) return;
  if (given.has("window")) sessionStorage.setItem("edge-sd-window", "1");
  history.replaceState(null, "", location.pathname);
  await session(token);
}

function login() {
  const dialog = document.getElementById("login");
  asking ??= new Promise((resolve) => {
    const input = dialog.querySelector("input");
    const wrong = dialog.querySelector("[role=alert]");
    dialog.querySelector("form").onsubmit = async (event) => {
      event.preventDefault();
      if (await session(input.value)) {
        dialog.close();
        asking = null;
        resolve();
      } else {
        wrong.hidden = false;
        wrong.textContent = "That is not it.";
      }
    };
    dialog.oncancel = (event) => event.preventDefault();
    dialog.showModal();
  });
  return asking;
}

// Calls `heard(kind, data)` for each event, and `link(up)` when the connection comes and goes.
export function listen(heard, link) {
  const source = new EventSource("/api/events?previews=true");
  source.onopen = () => link(true);
  source.onerror = () => {
    link(false);
    if (source.readyState === EventSource.CLOSED) setTimeout(() => listen(heard, link), 2000);
  };
  for (const kind of ["state", "step", "picture", "gone", "preview"]) {
    source.addEventListener(kind, (event) => heard(kind, JSON.parse(event.data)));
  }
}

export const pictureUrl = (job, n) => `/api/jobs/${job.id}/pictures/${n}`;

// Whether this is the desktop window, which has native dialogs.
export const inWindow = () => sessionStorage.getItem("edge-sd-window") !== null;
