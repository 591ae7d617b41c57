import { render } from "preact";
import { App } from "./components/App.tsx";
import "./styles/tokens.css";
import "./styles/base.css";
import "./styles/picture.css";
import "./styles/chat.css";

const root = document.getElementById("page");
if (root) render(<App />, root);
